"""The joint model: one CLIP and one Stable Diffusion (1, 2 or XL) that share a text tower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, require_supported, require_trainable
from unidiff_sdk.training.checkpoints.text_sharing import layers_of, tower_of
from unidiff_sdk.training.config import Precision

from .batch import Batch, Conditions, whole_image_sizes
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
        self.text_encoder_2 = checkpoint.second.model if checkpoint.second else None
        self.zero_negative = bool(checkpoint.second and checkpoint.second.zero_negative)
        self.vae = checkpoint.vae.requires_grad_(False)
        self.conditioning_layer = checkpoint.conditioning_layer
        require_trainable(require_supported(checkpoint))
        self.latent_factor = checkpoint.latent_factor
        self.prediction_type: str = checkpoint.scheduler.config.prediction_type
        self.scheduler_config = checkpoint.scheduler_config
        self.sampler_defaults = checkpoint.sampler_defaults
        self.register_buffer("alpha_bar", checkpoint.scheduler.alphas_cumprod.clone(), persistent=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of the square images that the model generates."""
        side = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), side, side

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
        if self.text_encoder_2 is not None:
            checkpoint_activations(self.text_encoder_2)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to pixels. Differentiable, and not clipped.

        The VAE's `shift_factor` is ignored, as in diffusers' Stable Diffusion pipeline.

        latents: float[n, c, h, w]. Returns float[n, 3, h·f, w·f], approximately in [0, 1].
        """
        unscaled = latents / self.vae.config.scaling_factor
        # The published VAE of Stable Diffusion XL overflows in float16. The pipelines of 1 and 2 ignore `force_upcast`.
        upcast = self.precision == "fp16" and self.text_encoder_2 is not None and self.vae.config.force_upcast
        with torch.autocast(self.device.type, enabled=False) if upcast else nullcontext():
            return self.vae.decode(unscaled).sample.float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images to scaled latents, the mean of the VAE's posterior.

        pixels: float[n, 3, h, w] in [0, 1]. Returns float[n, c, h/f, w/f].
        """
        mean: Tensor = self.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return mean * self.vae.config.scaling_factor

    def encode_prompts(self, ids: Tensor) -> Conditions:
        """Encode captions for the UNet.

        ids: int64[n, tokens]. For Stable Diffusion XL, the tokens for the second text encoder follow those for the
        first, of the same number.
        """
        if self.text_encoder_2 is None:
            return Conditions(self.text_encoder(ids).last_hidden_state)
        first, second = ids.chunk(2, dim=1)
        # As in diffusers' pipeline: the states of the second-to-last layers, without the final norm.
        states = self.text_encoder(first, output_hidden_states=True).hidden_states[-2]
        larger = self.text_encoder_2(second, output_hidden_states=True)
        return Conditions(torch.cat([states, larger.hidden_states[-2]], dim=-1), larger.text_embeds)

    def unconditional(self, empty_ids: Tensor) -> Conditions:
        """What guidance leads away from, one row: the empty caption, or zeros if the pipeline uses them for it.

        empty_ids: int64[1, tokens], the tokens of "".
        """
        conditions = self.encode_prompts(empty_ids)
        return conditions.map(torch.zeros_like) if self.zero_negative else conditions

    def predict(self, z_t: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """The UNet's output for noisy latents: float[n, c, h, w].

        Args:
            z_t: float[n, c, h, w].
            t: [n], timesteps.
            conditions: of n samples.
        """
        added: dict[str, Any] = {}
        if conditions.pooled is not None:
            sizes = conditions.sizes
            if sizes is None:
                height, width = (side * self.latent_factor for side in z_t.shape[-2:])
                sizes = whole_image_sizes(len(z_t), height, width, z_t.device)
            added["added_cond_kwargs"] = {"text_embeds": conditions.pooled, "time_ids": sizes}
        output: Tensor = self.unet(z_t, t, conditions.states, **added).sample
        return output

    def encode_captions(
        self, batch: Batch, dropped: Tensor, empty_ids: Tensor, *, pooled: bool
    ) -> tuple[Conditions, Tensor | None]:
        """Encode captions for the UNet and for CLIP, in a single pass where both use the same tower.

        Args:
            dropped: bool[n], for the first n captions: condition the UNet on no caption instead, see `unconditional`.
            empty_ids: int64[1, tokens], the tokens of "".
            pooled: Whether CLIP's pooled states are needed.

        Returns:
            The conditions of the UNet for the first n captions; and float[m, width], CLIP's pooled states of all m
            captions, or None.
        """
        layer, n = self.conditioning_layer, len(dropped)
        dropped = dropped.to(batch.input_ids.device)
        if layer is None or not pooled:
            ids = torch.where(dropped[:, None], empty_ids, batch.input_ids[:n])
            conditions = self.encode_prompts(ids) if n else Conditions(batch.latents[:0])
            if self.zero_negative:
                conditions = conditions.map(lambda each: each.masked_fill(_as_column(dropped, each), 0))
            clip_ids = batch.input_ids if batch.clip_ids is None else batch.clip_ids
            in_clip = self.pool_text(clip_ids) if pooled else None
            return conditions.with_sizes(batch.sizes), in_clip
        ids = torch.cat([batch.input_ids, empty_ids]) if dropped.any() else batch.input_ids
        output: Any = self.clip.text_model(ids, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        states = torch.where(dropped[:, None, None], states[-1:], states[:n])
        if layer != -1:
            states = tower_of(self.text_encoder).final_layer_norm(states)
        return Conditions(states), output.pooler_output[: len(batch)]

    def unused_weights(self) -> set[nn.Parameter]:
        """The end of the first text encoder of Stable Diffusion XL, unless CLIP's text tower has it as well."""
        if self.text_encoder_2 is None:
            return set()
        unused = (layers_of(self.text_encoder)[-1], tower_of(self.text_encoder).final_layer_norm)
        return {p for module in unused for p in module.parameters()} - set(self.clip.parameters())


def _as_column(rows: Tensor, like: Tensor) -> Tensor:
    """One value for each row of `like`, in a shape that broadcasts: [n] -> [n, 1, …]."""
    return rows.view(-1, *[1] * (like.ndim - 1))
