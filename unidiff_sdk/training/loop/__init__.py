"""The training loops and everything that a run carries from step to step."""
