"""`python -m harness.worker.products` reads the names of precisions as JSON, and prints their times as JSON."""

from harness.worker.products.timing import main

main()
