"""Where each module goes: the libraries' own map, a better one, and a user's."""
