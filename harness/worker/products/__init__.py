"""Products by layers whose weights are stored packed, timed on this processor."""
