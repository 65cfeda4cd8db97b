"""A machine that is not here, by what people know of it: names of card and processor, kind of memory, kind of disk."""
