"""What this computer has and allows: tiers, cards, control groups, processes, signals, scratch space, whole-or-not-at-all writing."""
