"""How files are loaded: in which order their tensors come, and what the seconds go to."""
