"""What the files of a model hold, and how a library holds that: rules of formats and of quantization methods."""
