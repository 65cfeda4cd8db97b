"""Memory of training: on one card by a traced step, on many by DeepSpeed's own formulas; and the code that trains so."""
