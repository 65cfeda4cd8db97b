"""The words of training on one card: what is trained, by which optimizer, on how much, and what a step was seen to hold."""
