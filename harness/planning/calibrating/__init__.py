"""What was measured, fitted: figures of results and of timed products, the constants that follow, and what is kept of them."""
