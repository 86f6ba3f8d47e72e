"""What a checkpoint is worth: metrics, the frozen judge, validation during training."""
