"""The recipe of the built-in model, and its PyTorch checkpoint."""
