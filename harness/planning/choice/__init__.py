"""Which way of loading a model is best on a machine, which come nearest, and a search for both."""
