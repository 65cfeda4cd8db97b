"""One matrix over many machines: what must come back, who runs which part, and what did come back."""
