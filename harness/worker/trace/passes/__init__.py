"""The passes of a trace: taken apart, compared between sizes, fitted."""
