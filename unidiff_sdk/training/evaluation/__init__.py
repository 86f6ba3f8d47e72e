"""Evaluation of checkpoints: metrics, retrieval, generation, the frozen judge, and validation during training."""
