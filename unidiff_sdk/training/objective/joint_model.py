"""The joint model: one CLIP and one Stable Diffusion (1, 2, XL or 3) that share a text tower."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, require_supported
from unidiff_sdk.training.checkpoints.loading.second_text_encoder import THIRD_TOKENS
from unidiff_sdk.training.checkpoints.text_sharing import layers_of, tower_of
from unidiff_sdk.training.config import Precision

from .batch import Batch, Conditions, whole_image_sizes
from .encoder_model import EncoderModel, checkpoint_activations

__all__ = ["JointModel"]


class JointModel(EncoderModel):
    """The trainable parts of a checkpoint, and the frozen parts that the losses need.

    Args:
        checkpoint: The model shares its parts. The VAE and the third text encoder are frozen, and always in eval mode.
        precision: "bf16" and "fp16" run the matrix products within `autocast` in half precision. Weights stay float32.

    Attributes:
        unet: The UNet; the transformer of Stable Diffusion 3.
        alpha_bar: float[T], ᾱ_t of each noise level, falling. See `losses`.
        timesteps: [T], what the UNet takes as the timestep at each noise level, rising: 0 to T - 1. A transformer takes
            T·σ_t, where the scheduler's shift moves the levels σ_t towards high noise.

    Raises:
        CheckpointError: The losses do not support the checkpoint's UNet.
    """

    alpha_bar: Tensor
    timesteps: Tensor

    def __init__(self, checkpoint: Checkpoint, precision: Precision = "fp32") -> None:
        super().__init__(checkpoint.clip, checkpoint.normalization, precision)
        self.unet = checkpoint.unet
        self.text_encoder = checkpoint.text_encoder
        self.text_encoder_2 = checkpoint.second.model if checkpoint.second else None
        self.text_encoder_3 = checkpoint.third.model.requires_grad_(False) if checkpoint.third else None
        self.zero_negative = bool(checkpoint.second and checkpoint.second.zero_negative)
        self.vae = checkpoint.vae.requires_grad_(False)
        self.conditioning_layer = checkpoint.conditioning_layer
        require_supported(checkpoint)
        self.is_transformer = checkpoint.is_transformer
        self.latent_factor, self.latent_shift = checkpoint.latent_factor, checkpoint.latent_shift
        self.prediction_type = checkpoint.prediction_type
        self.schedule = checkpoint.schedule
        self.sampler_defaults = checkpoint.sampler_defaults
        alpha_bar, timesteps = _noise_levels(checkpoint)
        self.register_buffer("alpha_bar", alpha_bar, persistent=False)
        self.register_buffer("timesteps", timesteps, persistent=False)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of the latents of the square images that the model generates."""
        side = int(self.unet.config.sample_size)
        return int(self.unet.config.in_channels), side, side

    def train(self, mode: bool = True) -> JointModel:
        """Training mode, or eval mode. The frozen parts stay in eval mode: a T5 has dropout."""
        super().train(mode)
        for frozen in (self.vae, self.text_encoder_3):
            if frozen is not None:
                frozen.eval()
        return self

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

        The VAE's `shift_factor` is ignored, as in diffusers' Stable Diffusion pipeline. Only that of 3 adds it.

        latents: float[n, c, h, w]. Returns float[n, 3, h·f, w·f], approximately in [0, 1].
        """
        unscaled = latents / self.vae.config.scaling_factor + self.latent_shift
        # The published VAE of Stable Diffusion XL overflows in float16. The pipelines of 1 and 2 ignore `force_upcast`.
        with self._upcast(self.text_encoder_2 is not None and self.vae.config.force_upcast):
            return self.vae.decode(unscaled).sample.float() / 2 + 0.5

    def _upcast(self, overflows: bool) -> AbstractContextManager[Any]:
        """Context that runs a model in float32 if it overflows in the precision float16."""
        upcast = overflows and self.precision == "fp16"
        return torch.autocast(self.device.type, enabled=False) if upcast else nullcontext()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode images to scaled latents, the mean of the VAE's posterior.

        pixels: float[n, 3, h, w] in [0, 1]. Returns float[n, c, h/f, w/f].
        """
        mean: Tensor = self.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return (mean - self.latent_shift) * self.vae.config.scaling_factor

    def encode_prompts(self, ids: Tensor) -> Conditions:
        """Encode captions for the UNet.

        ids: int64[n, tokens], see `prompt_ids`.
        """
        if self.text_encoder_2 is None:
            return Conditions(self.text_encoder(ids).last_hidden_state)
        third_tokens = 0 if self.text_encoder_3 is None else THIRD_TOKENS
        ids, third = ids.split([ids.shape[1] - third_tokens, third_tokens], dim=1)
        first, second = ids.chunk(2, dim=1)
        # As in diffusers' pipeline: the states of the second-to-last layers, without the final norm.
        large = self.text_encoder(first, output_hidden_states=True)
        larger = self.text_encoder_2(second, output_hidden_states=True)
        states = torch.cat([large.hidden_states[-2], larger.hidden_states[-2]], dim=-1)
        if not self.is_transformer:
            return Conditions(states, larger.text_embeds)
        padded = F.pad(states, (0, int(self.unet.config.joint_attention_dim) - states.shape[-1]))
        pooled = torch.cat([large.text_embeds, larger.text_embeds], dim=-1)
        return Conditions(torch.cat([padded, self._third_states(third, padded)], dim=1), pooled)

    @torch.no_grad()
    def _third_states(self, ids: Tensor, like: Tensor) -> Tensor:
        """States of the third text encoder, or the zeros that stand for them, as `like`: float[n, tokens, width].

        Padding is not masked, as in diffusers.
        """
        if self.text_encoder_3 is None:
            return like.new_zeros(len(like), THIRD_TOKENS, like.shape[-1])
        with self._upcast(overflows=True):
            states: Tensor = self.text_encoder_3(ids).last_hidden_state
        return states.to(like.dtype)

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
            t: [n], timesteps, as in `timesteps`.
            conditions: of n samples.
        """
        output: Tensor
        if self.is_transformer:
            conditioning = {"encoder_hidden_states": conditions.states, "pooled_projections": conditions.pooled}
            output = self.unet(z_t, timestep=t, **conditioning).sample
            return output
        added: dict[str, Any] = {}
        if conditions.pooled is not None:
            sizes = conditions.sizes
            if sizes is None:
                height, width = (side * self.latent_factor for side in z_t.shape[-2:])
                sizes = whole_image_sizes(len(z_t), height, width, z_t.device)
            added["added_cond_kwargs"] = {"text_embeds": conditions.pooled, "time_ids": sizes}
        output = self.unet(z_t, t, conditions.states, **added).sample
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
        """The end of the first text encoder of Stable Diffusion XL, unless CLIP's text tower has it as well.

        In Stable Diffusion 3, the queries of the text in the last block of the transformer, whose text states are not
        read.
        """
        if self.text_encoder_2 is None:
            return set()
        if self.is_transformer:
            attention = self.unet.transformer_blocks[-1].attn
            queries = (attention.add_q_proj, attention.norm_added_q)
            return {p for module in queries if module is not None for p in module.parameters()}
        unused = (layers_of(self.text_encoder)[-1], tower_of(self.text_encoder).final_layer_norm)
        return {p for module in unused for p in module.parameters()} - set(self.clip.parameters())


def _noise_levels(checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """ᾱ_t and the timesteps of a checkpoint's noise levels, see `JointModel`."""
    if checkpoint.is_transformer:
        # A new scheduler has the levels of training; one that has generated has those of its steps.
        scheduler = type(checkpoint.scheduler).from_config(checkpoint.scheduler.config)
        return 1 - scheduler.sigmas.flip(0), scheduler.timesteps.flip(0)
    alpha_bar = checkpoint.scheduler.alphas_cumprod.clone()
    return alpha_bar, torch.arange(len(alpha_bar))


def _as_column(rows: Tensor, like: Tensor) -> Tensor:
    """One value for each row of `like`, in a shape that broadcasts: [n] -> [n, 1, …]."""
    return rows.view(-1, *[1] * (like.ndim - 1))
