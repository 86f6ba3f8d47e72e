"""Joint fine-tuning of CLIP and Stable Diffusion, its judging, and the checkpoints between them. Needs PyTorch.

Everything here imports torch, diffusers and transformers (the `train` extra); the runtime never imports this package.
"""
