"""What a worker tells, what is sampled around it, and the pure functions that judge it."""
