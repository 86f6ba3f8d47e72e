"""The joint model: one CLIP and one Stable Diffusion with a text tower in common, and the loss of one batch of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, require_supported
from unidiff_sdk.training.config import Precision, TrainingConfig

from . import losses

__all__ = [
    "Batch",
    "Draws",
    "Forward",
    "ImageTower",
    "JointModel",
    "contrast",
    "forward",
    "joint_losses",
    "prior_means",
    "term_weights",
]


@dataclass(frozen=True)
class Batch:
    """m pairs, ready for the losses; the first n ≤ m of them also go through the UNet.

    clip_pixels: float[m, 3, s, s], normalized for CLIP; latents: float[n, c, h, w], scaled as the UNet sees them;
    input_ids: int64[m, tokens]; groups: int64[m], equal where two pairs mean the same. clip_ids: int64[m, tokens],
    where CLIP's text tower has another tokenizer than the UNet's text encoder. base: what the base's CLIP makes of the
    same pairs, "u" and "v": float[m, d], where there is a leash to it.
    """

    clip_pixels: Tensor
    latents: Tensor
    input_ids: Tensor
    groups: Tensor
    clip_ids: Tensor | None = None
    base: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Draws:
    """What chance decides about the n samples of a step that go through the UNet. On the CPU.

    t: int64[n]; noise: float[n, c, h, w]; dropped: bool[n], whose caption is left out; gated: bool[n], under the gate
    of RSC; decoded: bool[n], the gated ones whose estimate is decoded. samples, decoded_samples, pairs: how many there
    are in the whole step, of which these may be a part: a term's mean is over them.
    """

    t: Tensor
    noise: Tensor
    dropped: Tensor
    gated: Tensor
    decoded: Tensor
    samples: int
    decoded_samples: int
    pairs: int

    @classmethod
    def of(
        cls,
        generator: torch.Generator,
        samples: int,
        shape: tuple[int, ...],
        timesteps: int,
        config: TrainingConfig,
        *,
        pairs: int,
    ) -> Draws:
        """shape: (c, h, w) of the latents; timesteps: how many the noise schedule has; pairs: of the whole step."""
        t = torch.randint(0, timesteps, (samples,), generator=generator)
        noise = torch.randn((samples, *shape), generator=generator)
        dropped = torch.rand(samples, generator=generator) < config.caption_dropout
        gated = t <= config.rsc_t_max
        decoded = gated & (gated.cumsum(0) <= config.rsc_samples)
        return cls(t, noise, dropped, gated, decoded, samples, int(decoded.sum()), pairs)

    def rows(self, rows: Tensor) -> Draws:
        """Those of some of the samples."""
        t, noise, dropped, gated, decoded = (
            each[rows] for each in (self.t, self.noise, self.dropped, self.gated, self.decoded)
        )
        return Draws(t, noise, dropped, gated, decoded, self.samples, self.decoded_samples, self.pairs)


class ImageTower(nn.Module):
    """f: pictures onto the unit sphere. float[n, 3, s, s], normalized for CLIP -> float[n, d]."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection

    def forward(self, clip_pixels: Tensor) -> Tensor:
        return F.normalize(self.visual_projection(self.vision_model(clip_pixels).pooler_output).float(), dim=-1)

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """In eval mode: no dropout, and no checkpointing, which would compute anew with the weights of the moment."""
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)


class JointModel(nn.Module):
    """The trainable parts of a checkpoint and what the losses need of its frozen ones.

    precision: "bf16" and "fp16" run the models' matrix products in half precision where they are called within
    `autocast`; weights stay float32.
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
        require_supported(checkpoint)
        self.prediction_type: str = checkpoint.scheduler.config.prediction_type
        self.register_buffer("alpha_bar", checkpoint.scheduler.alphas_cumprod.clone(), persistent=False)
        processor = checkpoint.image_processor
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(processor, name))[:, None, None], persistent=False)
        self.clip_size: int = checkpoint.clip.config.vision_config.image_size

    def autocast(self) -> torch.autocast:
        """The context of the models' forward passes. Losses stay outside: bfloat16 has three decimal digits."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.alpha_bar.device.type, half, enabled=self.precision != "fp32")

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """In eval mode and without gradients, for as long as the block lasts. The VAE always stays in eval mode."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)
            self.vae.eval()

    def checkpoint_activations(self) -> None:
        """Keep few activations on the way forward and compute the others again on the way back.

        Chen et al. 2016, "Training deep nets with sublinear memory cost".
        """
        for model in (self.unet, self.vae):
            model.enable_gradient_checkpointing()
        for model in (self.clip, self.text_encoder):
            # transformers 6 knows only the second name, 4 and early 5 only the first.
            names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
            enable = next(getattr(model, name) for name in names if hasattr(model, name))
            # Reentrant, as transformers 4 has it, adapters above frozen embeddings would learn nothing.
            enable({"use_reentrant": False})

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

    def read(self, batch: Batch, dropped: Tensor, empty_ids: Tensor, *, pooled: bool) -> tuple[Tensor, Tensor | None]:
        """What the UNet and CLIP are told of the captions.

        The first are token states, one for each of `dropped` (bool[n], of the first n captions): τ(y), or τ("") where
        the caption is left out, as guidance needs a UNet that knows both. The second is CLIP's pooled state of all m
        captions. Where the UNet's text encoder is a prefix of CLIP's tower, one pass gives both.

        empty_ids: int64[1, tokens], the tokens of "".
        """
        layer, n = self.conditioning_layer, len(dropped)
        dropped = dropped.to(batch.input_ids.device)
        if layer is None or not pooled:
            told = torch.where(dropped[:, None], empty_ids, batch.input_ids[:n])
            own = self.text_encoder(told).last_hidden_state if n else batch.latents[:0]
            ids = batch.input_ids if batch.clip_ids is None else batch.clip_ids
            return own, self.clip.text_model(ids).pooler_output if pooled else None
        ids = torch.cat([batch.input_ids, empty_ids]) if dropped.any() else batch.input_ids
        answer: Any = self.clip.text_model(ids, output_hidden_states=layer != -1)
        states = answer.last_hidden_state if layer == -1 else answer.hidden_states[layer]
        states = torch.where(dropped[:, None, None], states[-1:], states[:n])
        if layer != -1:
            states = getattr(self.text_encoder, "text_model", self.text_encoder).final_layer_norm(states)
        return states, answer.pooler_output[: len(batch)]

    def text_embeds(self, pooled: Tensor) -> Tensor:
        """g: the text tower's pooled state, float[n, width], onto the unit sphere, float[n, d]."""
        return F.normalize(self.clip.text_projection(pooled).float(), dim=-1)

    def image_tower_of(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of weights named as in this model (an EMA), those of f, named as in f; its own where there are none."""
        return {name: weights.get(f"clip.{name}", own) for name, own in self.f.named_parameters()}


@dataclass(frozen=True)
class Denoising:
    """One forward pass of the UNet over a batch: what was asked and what it answered."""

    alpha_bar: Tensor  # float[n]
    z_t: Tensor
    target: Tensor
    output: Tensor
    features: Tensor  # float[n, c], the mid-block's, pooled


@dataclass(frozen=True)
class Forward:
    """What the models make of a batch, or of a part of a step's batch.

    means: terms that are means over samples, by name: this part's share of the step's mean. embeddings: what the
    terms between samples are made of: "u", "v": float[m, d]; "h": float[n, c]; "generated": float[n, d], zero where
    none was decoded.
    """

    means: dict[str, Tensor]
    embeddings: dict[str, Tensor]


def joint_losses(
    model: JointModel,
    batch: Batch,
    config: TrainingConfig,
    *,
    draws: Draws,
    empty_ids: Tensor,
    step: int,
    teacher: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[float, Tensor]]:
    """Each term that is switched on, by name, as (its λ at this step, its value), of a whole batch in one piece.

    empty_ids: int64[1, tokens], the tokens of "". teacher: weights named as the model's, for those of RSC's teacher;
    default: the tuned ones.
    """
    result = forward(model, batch, config, draws=draws, empty_ids=empty_ids, teacher=teacher)
    values = result.means | contrast(model, result.embeddings, batch.groups, config, draws)
    weights = term_weights(config, step)
    return {name: (weights[name], values[name]) for name in weights if name in values}


def term_weights(config: TrainingConfig, step: int) -> dict[str, float]:
    """λ of each term that is switched on, at this step, counted from 0; those of the prior if there is one."""
    ramp = losses.warm_up(step, config.rsc_warmup_steps)
    weights = {
        "itc": config.lambda_itc,
        "is": config.lambda_is,
        "rsc": config.lambda_rsc,
        "rsc_generated": config.lambda_rsc_generated,
        "rsc_feature": config.lambda_rsc_feature,
        "leash": config.lambda_leash,
        "prior": config.lambda_prior * config.lambda_is,
        "prior_leash": config.lambda_prior * config.lambda_leash,
    }
    return {name: weight * (ramp if "rsc" in name else 1.0) for name, weight in weights.items() if weight}


def forward(
    model: JointModel,
    batch: Batch,
    config: TrainingConfig,
    *,
    draws: Draws,
    empty_ids: Tensor,
    teacher: Mapping[str, Tensor] | None = None,
    embeddings_only: bool = False,
) -> Forward:
    """Run the models over a batch. embeddings_only: leave out the means, and the UNet where no embedding needs it."""
    n = len(batch.latents)
    runs_unet = n > 0 and (config.embeds_generator if embeddings_only else config.trains_generator)
    means: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}

    # 1. texts, and pictures as CLIP sees them
    with model.autocast():
        dropped = draws.dropped if runs_unet else draws.dropped[:0]
        states, pooled = model.read(batch, dropped, empty_ids, pooled=config.embeds_texts)
        if pooled is not None:
            embeddings["v"] = model.text_embeds(pooled)
        if config.trains_encoder:
            embeddings["u"] = model.f(batch.clip_pixels)
    if config.lambda_leash and not embeddings_only:
        means["leash"] = _leash(embeddings, batch, draws)
    if not runs_unet:
        return Forward(means, embeddings)

    # 2. IS
    with model.autocast():
        denoising = _denoise(model, batch.latents, states, draws)
    if config.lambda_is and not embeddings_only:
        means["is"] = _synthesis(model, denoising, config, draws)
    if config.lambda_rsc_feature:
        embeddings["h"] = denoising.features

    # 3. RSC; CLIP takes no empty batch, so with nothing under the gate its mean is a zero that can be differentiated
    if not config.decodes:
        return Forward(means, embeddings)
    passed = draws.decoded.nonzero().flatten().to(batch.latents.device)
    estimates = _denoising_estimates(model, denoising, passed) if len(passed) else None
    if config.lambda_rsc and not embeddings_only:
        means["rsc"] = 0.0 * denoising.output.sum()
        if estimates is not None:
            u_hat, u_bar = _teach(model, teacher, estimates, batch.clip_pixels[passed])
            value = losses.rsc_pixel(u_hat, u_bar, denoising.alpha_bar[passed])
            means["rsc"] = value * (len(passed) / draws.decoded_samples)
    if config.lambda_rsc_generated:
        embeddings["generated"] = torch.zeros_like(embeddings["u"][:n])
        if estimates is not None:
            with model.autocast():
                embeddings["generated"] = embeddings["generated"].index_copy(0, passed, model.f(estimates.detach()))
    return Forward(means, embeddings)


def prior_means(
    model: JointModel, batch: Batch, config: TrainingConfig, *, draws: Draws, empty_ids: Tensor
) -> dict[str, Tensor]:
    """What pairs of the base's own world teach, see `prior`: IS and the leash, as shares of the step's means."""
    means: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}
    with model.autocast():
        dropped = draws.dropped if config.lambda_is else draws.dropped[:0]
        states, pooled = model.read(batch, dropped, empty_ids, pooled=config.lambda_leash > 0)
        if pooled is not None:
            embeddings["v"] = model.text_embeds(pooled)
            if config.trains_encoder:
                embeddings["u"] = model.f(batch.clip_pixels)
        if config.lambda_is:
            denoising = _denoise(model, batch.latents, states, draws)
    if config.lambda_is:
        means["prior"] = _synthesis(model, denoising, config, draws)
    if embeddings:
        means["prior_leash"] = _leash(embeddings, batch, draws)
    return means


def _synthesis(model: JointModel, denoising: Denoising, config: TrainingConfig, draws: Draws) -> Tensor:
    """IS: this part's share of the step's mean."""
    weight = losses.min_snr_weight(denoising.alpha_bar, config.min_snr_gamma, model.prediction_type)
    value = losses.synthesis(denoising.output, denoising.target, weight)
    return value * (len(denoising.output) / draws.samples)


def _leash(embeddings: Mapping[str, Tensor], batch: Batch, draws: Draws) -> Tensor:
    """The mean over pictures and texts, as far as they are embedded: this part's share."""
    sides = [losses.leash(embeddings[side], batch.base[side]) for side in ("u", "v") if side in embeddings]
    return torch.stack(sides).mean() * (len(batch) / draws.pairs)


def contrast(
    model: JointModel, embeddings: Mapping[str, Tensor], groups: Tensor, config: TrainingConfig, draws: Draws
) -> dict[str, Tensor]:
    """The terms between samples, of a whole step's embeddings. groups: int64[m]; draws: of all its n samples."""
    values: dict[str, Tensor] = {}
    if not config.trains_encoder:
        return values
    u, v = embeddings["u"], embeddings["v"]
    positives = losses.same_meaning(groups, groups)
    gated, decoded = (mask.nonzero().flatten().to(u.device) for mask in (draws.gated, draws.decoded))
    if config.lambda_itc:
        values["itc"] = losses.itc(u, v, model.clip.logit_scale, positives)
    if config.lambda_rsc_generated:
        values["rsc_generated"] = 0.0 * (u.sum() + v.sum())
        if len(decoded):
            alpha_bar = model.alpha_bar[draws.t.to(u.device)[decoded]]
            values["rsc_generated"] = losses.generated_positives(
                embeddings["generated"][decoded], v, model.clip.logit_scale, positives[decoded], alpha_bar
            )
    if config.lambda_rsc_feature:
        values["rsc_feature"] = losses.rsc_feature(embeddings["h"][gated], u[gated])
    return values


def _teach(
    model: JointModel, weights: Mapping[str, Tensor] | None, estimates: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """What RSC's teacher f̄ sees in the estimates, differentiable, and in the pictures themselves."""
    teacher = model.image_tower_of(weights or {})
    with model.autocast(), model.f.as_teacher():
        u_hat = losses.gradient_only_through_input(model.f, teacher, estimates)
        with torch.no_grad():
            return u_hat, losses.gradient_only_through_input(model.f, teacher, pixels)


def _denoising_estimates(model: JointModel, denoising: Denoising, rows: Tensor) -> Tensor:
    """x̂_0 = D(ẑ_0) of these rows of the batch, as CLIP takes pictures."""
    z_t, output, alpha_bar = denoising.z_t[rows], denoising.output[rows], denoising.alpha_bar[rows]
    with model.autocast():
        z_0 = losses.predict_original(z_t, output, alpha_bar, model.prediction_type)
        return model.to_clip(model.decode(z_0))


def _denoise(model: JointModel, z: Tensor, states: Tensor, draws: Draws) -> Denoising:
    t, noise = draws.t.to(z.device), draws.noise.to(z.device)
    alpha_bar = model.alpha_bar[t]
    z_t = losses.add_noise(z, noise, alpha_bar)
    pooled: list[Tensor] = []
    hook = model.unet.mid_block.register_forward_hook(lambda *call: pooled.append(call[-1].mean(dim=(2, 3))))
    try:
        output = model.unet(z_t, t, states).sample
    finally:
        hook.remove()
    target = losses.diffusion_target(z, noise, alpha_bar, model.prediction_type)
    return Denoising(alpha_bar, z_t, target, output.float(), pooled[0].float())
