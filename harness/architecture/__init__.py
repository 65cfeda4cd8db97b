"""A model without its weights: skeleton, how stored names map to it, whether files agree with it, random weights of its shape."""
