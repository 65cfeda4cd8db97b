"""What this computer has and allows: memory tiers, cards, control groups, processes, signals, scratch space, atomic writes."""
