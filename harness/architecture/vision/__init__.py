"""What a picture costs a model that sees: its tokens, and what the vision tower takes; traced by a worker, read here."""
