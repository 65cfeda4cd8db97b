"""`python -m harness.worker.products`: reads what to time as JSON, prints what it took as JSON."""

from harness.worker.products.timing import main

main()
