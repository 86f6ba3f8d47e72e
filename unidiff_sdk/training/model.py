"""The joint model: one CLIP and one Stable Diffusion with a text tower in common, and the loss of one batch of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training import losses
from unidiff_sdk.training.checkpoint import Checkpoint
from unidiff_sdk.training.config import Precision, TrainingConfig

__all__ = ["Batch", "ImageTower", "JointModel", "joint_losses"]


@dataclass(frozen=True)
class Batch:
    """n pairs, ready for the losses.

    clip_pixels: float[n, 3, s, s], normalised for CLIP; latents: float[n, c, h, w], scaled as the UNet sees them;
    input_ids: int64[n, tokens]; groups: int64[n], equal where two pairs mean the same.
    """

    clip_pixels: Tensor
    latents: Tensor
    input_ids: Tensor
    groups: Tensor

    def __len__(self) -> int:
        return len(self.latents)


class ImageTower(nn.Module):
    """f: pictures onto the unit sphere. float[n, 3, s, s], normalised for CLIP -> float[n, d]."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection

    def forward(self, clip_pixels: Tensor) -> Tensor:
        return F.normalize(self.visual_projection(self.vision_model(clip_pixels).pooler_output).float(), dim=-1)


class JointModel(nn.Module):
    """The trainable parts of a checkpoint and what the losses need of its frozen ones.

    precision: "bf16" runs the models' matrix products in bfloat16 where they are called within `autocast`.
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
        self.shared = checkpoint.shared
        self.prediction_type: str = checkpoint.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise CheckpointError(
                f"{checkpoint.path} predicts {self.prediction_type!r}; epsilon and v_prediction can be trained"
            )
        self.register_buffer("alpha_bar", checkpoint.scheduler.alphas_cumprod.clone(), persistent=False)
        processor = checkpoint.image_processor
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(processor, name))[:, None, None], persistent=False)
        self.clip_size: int = checkpoint.clip.config.vision_config.image_size

    def autocast(self) -> torch.autocast:
        """The context of the models' forward passes. Losses stay outside: bfloat16 has three decimal digits."""
        return torch.autocast(self.alpha_bar.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def to_clip(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], float[n, 3, h, w], as CLIP takes them; differentiable."""
        if pixels.shape[-1] != self.clip_size:
            pixels = F.interpolate(pixels, (self.clip_size,) * 2, mode="bicubic", antialias=True)
        return (pixels - self.image_mean) / self.image_std

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents, float[n, c, h, w], to pictures in about [0, 1]; differentiable, nothing is clipped."""
        config = self.vae.config
        unscaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        return self.vae.decode(unscaled).sample.float() / 2 + 0.5

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pictures in [0, 1], float[n, 3, h, w], to scaled latents: the mean of the VAE's posterior."""
        config = self.vae.config
        mean = self.vae.encode(pixels * 2 - 1).latent_dist.mode()
        return (mean - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor

    def text_embeds(self, pooled: Tensor) -> Tensor:
        """g: the text tower's pooled state, float[n, width], onto the unit sphere, float[n, d]."""
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def image_tower_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of weights named as in this model (an EMA), those of f, named as in f."""
        return {name: weights[f"clip.{name}"] for name, _ in self.f.named_parameters()}


@dataclass(frozen=True)
class Denoising:
    """One forward pass of the UNet over a batch: what was asked and what it answered."""

    t: Tensor  # int64[n]
    alpha_bar: Tensor  # float[n]
    z_t: Tensor
    target: Tensor
    output: Tensor
    features: Tensor  # float[n, c], the mid-block's, pooled


def joint_losses(
    model: JointModel,
    batch: Batch,
    config: TrainingConfig,
    *,
    empty_ids: Tensor,
    generator: torch.Generator,
    step: int,
    ema: Mapping[str, Tensor],
) -> dict[str, tuple[float, Tensor]]:
    """Each term that is switched on, by name, as (its λ at this step, its value).

    empty_ids: int64[1, tokens], the tokens of "". generator: decides noise, timesteps and dropout. ema: the averaged
    weights, read only where they are the teacher.
    """
    terms: dict[str, tuple[float, Tensor]] = {}
    ramp = losses.warm_up(step, config.rsc_warmup_steps)

    # 1. texts: with a shared tower, one pass gives both the UNet's token states and the embedding's pooled state
    with model.autocast():
        text: Any = model.text_encoder(batch.input_ids) if model.shared or config.trains_generator else None
        if config.trains_encoder:
            pooled = text.pooler_output if model.shared else model.clip.text_model(batch.input_ids).pooler_output
            v = model.text_embeds(pooled)
            u = model.f(batch.clip_pixels)
            positives = losses.same_meaning(batch.groups, batch.groups)

    # 2. ITC
    if config.lambda_itc:
        terms["itc"] = config.lambda_itc, losses.itc(u, v, model.clip.logit_scale, positives)

    # 3. IS
    if config.trains_generator:
        with model.autocast():
            states = _drop_captions(model, text.last_hidden_state, empty_ids, config.caption_dropout, generator)
            denoising = _denoise(model, batch.latents, states, generator)
    if config.lambda_is:
        weight = losses.min_snr_weight(denoising.alpha_bar, config.min_snr_gamma, model.prediction_type)
        terms["is"] = config.lambda_is, losses.synthesis(denoising.output, denoising.target, weight)

    # 4. RSC; CLIP takes no empty batch, so with nothing under the gate its terms are a zero that can be differentiated
    if config.decodes:
        nothing = 0.0 * denoising.output.sum()
        passed = (denoising.t <= config.rsc_t_max).nonzero().flatten()[: config.rsc_samples]
        alpha_bar = denoising.alpha_bar[passed]
        estimates = _denoising_estimates(model, denoising, passed) if len(passed) else None
    if config.lambda_rsc:
        value = nothing
        if estimates is not None:
            teacher = model.image_tower_of(ema) if config.rsc_teacher == "ema" else dict(model.f.named_parameters())
            with model.autocast():
                u_hat = losses.gradient_only_through_input(model.f, teacher, estimates)
                with torch.no_grad():
                    u_bar = losses.gradient_only_through_input(model.f, teacher, batch.clip_pixels[passed])
            value = losses.rsc_pixel(u_hat, u_bar, alpha_bar)
        terms["rsc"] = config.lambda_rsc * ramp, value
    if config.lambda_rsc_generated:
        value = nothing
        if estimates is not None:
            with model.autocast():
                u_hat = model.f(estimates.detach())
            value = losses.generated_positives(u_hat, v, model.clip.logit_scale, positives[passed], alpha_bar)
        terms["rsc_generated"] = config.lambda_rsc_generated * ramp, value
    if config.lambda_rsc_feature:
        gated = denoising.t <= config.rsc_t_max
        structure = losses.rsc_feature(denoising.features[gated], u[gated])
        terms["rsc_feature"] = config.lambda_rsc_feature * ramp, structure
    return terms


def _denoising_estimates(model: JointModel, denoising: Denoising, rows: Tensor) -> Tensor:
    """x̂_0 = D(ẑ_0) of these rows of the batch, as CLIP takes pictures."""
    z_t, output, alpha_bar = denoising.z_t[rows], denoising.output[rows], denoising.alpha_bar[rows]
    with model.autocast():
        z_0 = losses.predict_original(z_t, output, alpha_bar, model.prediction_type)
        return model.to_clip(model.decode(z_0))


def _drop_captions(
    model: JointModel, states: Tensor, empty_ids: Tensor, share: float, generator: torch.Generator
) -> Tensor:
    """τ(y), or τ("") for a random share of the batch: guidance needs a UNet that knows both."""
    if not share:
        return states
    dropped = torch.rand(len(states), generator=generator).to(states.device) < share
    empty = model.text_encoder(empty_ids).last_hidden_state
    return torch.where(dropped[:, None, None], empty, states)


def _denoise(model: JointModel, z: Tensor, states: Tensor, generator: torch.Generator) -> Denoising:
    # Drawn on the CPU, so that one seed gives one run on every device.
    t = torch.randint(0, len(model.alpha_bar), (len(z),), generator=generator).to(z.device)
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    alpha_bar = model.alpha_bar[t]
    z_t = losses.add_noise(z, noise, alpha_bar)
    pooled: list[Tensor] = []
    hook = model.unet.mid_block.register_forward_hook(lambda *call: pooled.append(call[-1].mean(dim=(2, 3))))
    try:
        output = model.unet(z_t, t, states).sample
    finally:
        hook.remove()
    target = losses.diffusion_target(z, noise, alpha_bar, model.prediction_type)
    return Denoising(t, alpha_bar, z_t, target, output.float(), pooled[0].float())
