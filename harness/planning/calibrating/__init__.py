"""What was measured, fitted: figures of results, the constants that follow, and what is kept of them."""
