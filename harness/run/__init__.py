"""One run from end to end: options, the models of a run, a worker process for each case, resume, live line."""
