"""One step of training on a card that is not there: forward, backward and what is alive at the peak."""
