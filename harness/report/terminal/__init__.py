"""Results and plans as terminal tables."""
