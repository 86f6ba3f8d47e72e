"""Checkpoints on disk, and the base models that fine-tuning starts from."""
