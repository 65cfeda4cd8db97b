"""What runs in a process of its own: the only place, with `harness.models`, that imports torch and transformers."""
