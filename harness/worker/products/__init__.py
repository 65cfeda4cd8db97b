"""Times products as decoding does them, in a process of its own."""
