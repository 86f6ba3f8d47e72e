"""The training objective: the joint model, its losses and the choice of trainable weights."""
