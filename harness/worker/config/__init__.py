"""What transformers makes of a config, and why it makes nothing of one."""
