"""The joint model: one CLIP and one Stable Diffusion that share a text tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, require_supported, require_trainable
from unidiff_sdk.training.config import Precision

from .batch import Batch

__all__ = ["ImageTower", "JointModel"]


class ImageTower(nn.Module):
    """f: CLIP's image tower and projection, onto the unit sphere."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection

    def forward(self, clip_pixels: Tensor) -> Tensor:
        """Embed images. float[n, 3, s, s], normalized for CLIP -> float[n, d], unit rows."""
        return F.normalize(self.visual_projection(self.vision_model(clip_pixels).pooler_output).float(), dim=-1)

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Eval mode within the block: no dropout, and no activation checkpointing.

        Checkpointing would recompute the activations with the weights that the tower has by then.
        """
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)


class JointModel(nn.Module):
    """The trainable parts of a checkpoint, and the frozen parts that the losses need.

    Args:
        checkpoint: The model shares its parts. The VAE is frozen.
        precision: "bf16" and "fp16" run the matrix products within `autocast` in half precision. Weights stay float32.

    Raises:
        CheckpointError: The losses do not support the checkpoint's UNet.
    """

    alpha_bar: Tensor
    image_mean: Tensor
    image_std: Tensor

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "fp32") -> None:
        super().__init__()
        self.precision = precision
        self.unet = checkpoint.unet
        self.clip = checkpoint.clip
        self.text_encoder = checkpoint.text_encoder
        self.vae = checkpoint.vae.requires_grad_(False)
        self.f = ImageTower(checkpoint.clip)
        self.conditioning_layer = checkpoint.conditioning_layer
        require_trainable(require_supported(checkpoint))
        self.prediction_type: str = checkpoint.scheduler.config.prediction_type
        self.scheduler_config = checkpoint.scheduler_config
        self.sampler_defaults = checkpoint.sampler_defaults
        self.register_buffer("alpha_bar", checkpoint.scheduler.alphas_cumprod.clone(), persistent=False)
        for name, values in zip(("image_mean", "image_std"), checkpoint.normalization, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.clip_size: int = checkpoint.clip.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.alpha_bar.device

    def autocast(self) -> torch.autocast:
        """Context of the forward passes. Losses stay outside, because bfloat16 has three decimal digits."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.precision != "fp32")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients within the block. The VAE is always in eval mode."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)
            self.vae.eval()

    def checkpoint_activations(self) -> None:
        """Recompute most activations in the backward pass instead of keeping them.

        Chen et al. 2016, "Training deep nets with sublinear memory cost".
        """
        for model in (self.unet, self.vae):
            model.enable_gradient_checkpointing()
        for model in (self.clip, self.text_encoder):
            # transformers 6 has the first name only, 4 and early 5 the second.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(model, name) for name in names if hasattr(model, name))
            # With reentrant checkpointing, transformers 4's default, adapters above frozen embeddings learn nothing.
            enable({"use_reentrant": False})

    def to_clip(self, pixels: Tensor) -> Tensor:
        """Resize and normalize images for CLIP. Differentiable.

        pixels: float[n, 3, h, w] in [0, 1]. Returns float[n, 3, s, s].
        """
        if pixels.shape[-1] != self.clip_size:
            pixels = F.interpolate(pixels, (self.clip_size,) * 2, mode="bicubic", antialias=True)
        return (pixels - self.image_mean) / self.image_std

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
            return states, self.clip.text_model(clip_ids).pooler_output if pooled else None
        ids = torch.cat([batch.input_ids, empty_ids]) if dropped.any() else batch.input_ids
        output: Any = self.clip.text_model(ids, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        states = torch.where(dropped[:, None, None], states[-1:], states[:n])
        if layer != -1:
            states = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(states)
        return states, output.pooler_output[: len(batch)]

    def text_embeds(self, pooled: Tensor) -> Tensor:
        """g: project pooled text states, float[n, width], onto the unit sphere, float[n, d]."""
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def image_tower_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Select the weights of f from weights named as in this model, such as an EMA. Default: the current ones."""
        return {name: weights.get(f"clip.{name}", own) for name, own in self.f.named_parameters()}
