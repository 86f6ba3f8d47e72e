"""Training data: image-caption pairs, their latents and embeddings, and the batches of each step."""
