"""What a model's own code allocates on a GPU, traced without one: fake tensors on "cuda", and a ledger of every storage."""
