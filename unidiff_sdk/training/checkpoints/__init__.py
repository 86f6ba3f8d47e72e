"""Checkpoints on disk: loading, saving, model cards, and the bases that fine-tuning starts from."""
