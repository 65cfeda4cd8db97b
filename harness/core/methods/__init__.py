"""Quantization methods as transformers has them: one table that planning, inspecting, verifying and printed code read."""
