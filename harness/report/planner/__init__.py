"""The planner as a page: `fitmatrix plan` itself, run by Python in the reader's browser."""
