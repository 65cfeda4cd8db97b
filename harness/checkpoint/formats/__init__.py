"""File formats of weights, parsed byte by byte under bounds."""
