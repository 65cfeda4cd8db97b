"""GGUF files through transformers and the gguf package: their metadata as a config, and their weights as a checkpoint."""
