"""The joint model: one CLIP and one Stable Diffusion that share a text tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, require_supported, require_trainable
from unidiff_sdk.training.config import Precision

from .batch import Batch
from .encoder_model import EncoderModel, checkpoint_activations

__all__ = ["JointModel"]


class JointModel(EncoderModel):
    """The trainable parts of a checkpoint, and the frozen parts that the losses need.

    Args:
        checkpoint: The model shares its parts. The VAE is frozen.
        precision: "bf16" and "fp16" run the matrix products within `autocast` in half precision. Weights stay float32.

    Raises:
        CheckpointError: The losses do not support the checkpoint's UNet.
    """

    alpha_bar: Tensor

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "fp32") -> None:
        super().__init__(checkpoint.clip, checkpoint.normalization, precision)
        self.unet = checkpoint.unet
        self.text_encoder = checkpoint.text_encoder
        self.vae = checkpoint.vae.requires_grad_(False)
        self.conditioning_layer = checkpoint.conditioning_layer
        require_trainable(require_supported(checkpoint))
        self.prediction_type: str = checkpoint.scheduler.config.prediction_type
        self.scheduler_config = checkpoint.scheduler_config
        self.sampler_defaults = checkpoint.sampler_defaults
        self.register_buffer("alpha_bar", checkpoint.scheduler.alphas_cumprod.clone(), persistent=False)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients within the block. The VAE is always in eval mode."""
        try:
            with super().evaluating():
                yield
        finally:
            self.vae.eval()

    def checkpoint_activations(self) -> None:
        """Recompute most activations in the backward pass instead of keeping them, see `EncoderModel`."""
        super().checkpoint_activations()
        checkpoint_activations(self.text_encoder)
        for model in (self.unet, self.vae):
            model.enable_gradient_checkpointing()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to pixels. Differentiable, and not clipped.

        The VAE's `shift_factor` is ignored, as in diffusers' Stable Diffusion pipeline.

        latents: float[n, c, h, w]. Returns float[n, 3, h·f, w·f], approximately in [0, 1].
        """
        unscaled = latents / self.vae.config.scaling_factor
        return self.vae.decode(unscaled).sample.float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images to scaled latents, the mean of the VAE's posterior.

        pixels: float[n, 3, h, w] in [0, 1]. Returns float[n, c, h/f, w/f].
        """
        mean: Tensor = self.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return mean * self.vae.config.scaling_factor

    def encode_captions(
        self, batch: Batch, dropped: Tensor, empty_ids: Tensor, *, pooled: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Encode captions for the UNet and for CLIP, in a single pass where both use the same tower.

        Args:
            dropped: bool[n], for the first n captions: condition the UNet on the empty caption instead.
            empty_ids: int64[1, tokens], the tokens of "".
            pooled: Whether CLIP's pooled states are needed.

        Returns:
            float[n, tokens, width], the token states τ(y) that condition the UNet; and float[m, width], CLIP's pooled
            states of all m captions, or None.
        """
        layer, n = self.conditioning_layer, len(dropped)
        dropped = dropped.to(batch.input_ids.device)
        if layer is None or not pooled:
            ids = torch.where(dropped[:, None], empty_ids, batch.input_ids[:n])
            states = self.text_encoder(ids).last_hidden_state if n else batch.latents[:0]
            clip_ids = batch.input_ids if batch.clip_ids is None else batch.clip_ids
            return states, self.pool_text(clip_ids) if pooled else None
        ids = torch.cat([batch.input_ids, empty_ids]) if dropped.any() else batch.input_ids
        output: Any = self.clip.text_model(ids, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        states = torch.where(dropped[:, None, None], states[-1:], states[:n])
        if layer != -1:
            states = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(states)
        return states, output.pooler_output[: len(batch)]
