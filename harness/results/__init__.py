"""Results on disk: append, read with upgrade, compare, collect from many places, audit before publishing."""
