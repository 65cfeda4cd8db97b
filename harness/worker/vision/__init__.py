"""What one image takes in a model that sees, asked of the libraries themselves on fake tensors of a GPU."""
