"""What a worker reports, what is sampled around it, and the pure functions that judge it."""
