"""The training loops, and the state that a run carries from step to step."""
