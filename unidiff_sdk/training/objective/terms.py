"""The terms of the joint objective for a batch, or for a micro-batch of a step.

Per-sample terms are means over samples, so a micro-batch contributes a share of the step's mean. Pairwise terms compare
samples with each other. They need the embeddings of the whole step (see `loop.gradients`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff_sdk.training.config import TrainingConfig

from . import losses
from .batch import Batch, Conditions, RandomInputs
from .encoder_model import EncoderModel
from .joint_model import JointModel
from .score_consistency import Ranking, encoder_logits

__all__ = ["ForwardOutput", "forward", "joint_losses", "pairwise_terms", "prior_terms", "term_weights"]


@dataclass(frozen=True)
class Denoising:
    """Input, target and output of one UNet pass over n samples.

    Attributes:
        alpha_bar: float[n], ᾱ_t.
        z_t: float[n, c, h, w], noisy latents.
        target: float[n, c, h, w], ε or v, see `losses.diffusion_target`.
        output: float[n, c, h, w], the UNet's prediction of the target.
    """

    alpha_bar: Tensor
    z_t: Tensor
    target: Tensor
    output: Tensor


@dataclass(frozen=True)
class ForwardOutput:
    """Output of the models for a batch or a micro-batch.

    Attributes:
        terms: Per-sample terms by name: the share of this batch in the step's mean.
        embeddings: Inputs of the pairwise terms: "u" and "v", float[m, d].
    """

    terms: dict[str, Tensor]
    embeddings: dict[str, Tensor]


def term_weights(config: TrainingConfig, step: int) -> dict[str, float]:
    """Weight λ of each active term at a step, counted from 0. Prior terms are included whether or not there is a prior.

    RSC terms warm up linearly.
    """
    ramp = losses.linear_warmup(step, config.rsc_warmup_steps)
    weights = {
        "itc": config.lambda_itc,
        "is": config.lambda_is,
        "rsc": config.lambda_rsc,
        "rsc_encoder": config.lambda_rsc_encoder,
        "rsc_generator": config.lambda_rsc_generator,
        "rsc_reward": config.lambda_rsc_reward,
        "feature_distillation": config.lambda_feature_distillation,
        "prior": config.lambda_prior * config.lambda_is,
        "prior_feature_distillation": config.lambda_prior * config.lambda_feature_distillation,
    }
    return {name: weight * (ramp if "rsc" in name else 1.0) for name, weight in weights.items() if weight}


def joint_losses(
    model: EncoderModel,
    batch: Batch,
    config: TrainingConfig,
    *,
    random: RandomInputs,
    empty_ids: Tensor,
    step: int,
    teacher: Mapping[str, Tensor] | None = None,
) -> dict[str, tuple[float, Tensor]]:
    """Compute each active term of a whole batch in one piece: {name: (λ at this step, value)}.

    Args:
        random: Random inputs of the batch.
        empty_ids: int64[1, tokens], the tokens of "".
        step: Number of the step, from 0.
        teacher: Weights of RSC's teacher, named as in the model. Default: the current weights.
    """
    output = forward(model, batch, config, random=random, empty_ids=empty_ids, teacher=teacher)
    values = output.terms | pairwise_terms(model, output.embeddings, batch.groups, config)
    weights = term_weights(config, step)
    return {name: (weights[name], values[name]) for name in weights if name in values}


def forward(
    model: EncoderModel,
    batch: Batch,
    config: TrainingConfig,
    *,
    random: RandomInputs,
    empty_ids: Tensor,
    teacher: Mapping[str, Tensor] | None = None,
    embeddings_only: bool = False,
) -> ForwardOutput:
    """Run the models over a batch: per-sample terms, and the embeddings of the pairwise terms.

    embeddings_only: Skip the per-sample terms, and with them the UNet. Other arguments as in `joint_losses`.
    """
    n = len(batch.latents)
    runs_unet = n > 0 and config.denoises and not embeddings_only
    terms: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}

    # 1. texts and images in CLIP
    with model.autocast():
        dropped = random.dropped if runs_unet else random.dropped[:0]
        conditions, pooled = model.encode_captions(batch, dropped, empty_ids, pooled=config.embeds_texts)
        if pooled is not None:
            embeddings["v"] = model.text_embeds(pooled)
        if config.embeds_images:
            embeddings["u"] = model.f(batch.clip_pixels)
    if config.lambda_feature_distillation and not embeddings_only:
        terms["feature_distillation"] = _feature_distillation(embeddings, batch, random)
    if not (runs_unet and isinstance(model, JointModel)):
        return ForwardOutput(terms, embeddings)

    # 2. IS
    with model.autocast():
        denoising = _denoise(model, batch.latents, conditions, random)
    if config.lambda_is:
        terms["is"] = _synthesis(model, denoising, config, random)

    # 3. RSC on decoded estimates
    if config.lambda_rsc:
        terms["rsc"] = _rsc_pixel(model, teacher, batch, denoising, random)
    return ForwardOutput(terms, embeddings)


def prior_terms(
    model: EncoderModel, batch: Batch, config: TrainingConfig, *, random: RandomInputs, empty_ids: Tensor
) -> dict[str, Tensor]:
    """Terms of a batch of prior pairs: IS and feature distillation, as shares of the step's means."""
    terms: dict[str, Tensor] = {}
    embeddings: dict[str, Tensor] = {}
    with model.autocast():
        dropped = random.dropped if config.lambda_is else random.dropped[:0]
        conditions, pooled = model.encode_captions(
            batch, dropped, empty_ids, pooled=config.lambda_feature_distillation > 0
        )
        if pooled is not None:
            embeddings["v"] = model.text_embeds(pooled)
            if config.embeds_images:
                embeddings["u"] = model.f(batch.clip_pixels)
        if isinstance(model, JointModel) and config.lambda_is:
            denoising = _denoise(model, batch.latents, conditions, random)
    if isinstance(model, JointModel) and config.lambda_is:
        terms["prior"] = _synthesis(model, denoising, config, random)
    if embeddings:
        terms["prior_feature_distillation"] = _feature_distillation(embeddings, batch, random)
    return terms


def pairwise_terms(
    model: EncoderModel,
    embeddings: Mapping[str, Tensor],
    groups: Tensor,
    config: TrainingConfig,
    ranking: Ranking | None = None,
) -> dict[str, Tensor]:
    """Terms that compare the samples of a whole step: ITC and RSC encoder.

    Args:
        embeddings: As in `ForwardOutput`, of the whole step.
        groups: int64[m]. Pairs with equal values have the same meaning.
        ranking: The generator's ranking, which RSC encoder needs.
    """
    values: dict[str, Tensor] = {}
    if not config.trains_encoder:
        return values
    u, v = embeddings["u"], embeddings["v"]
    if config.lambda_itc:
        values["itc"] = model.contrast(u, v, losses.same_meaning(groups, groups))
    if config.lambda_rsc_encoder and ranking is not None:
        logits = encoder_logits(u, v, ranking.candidates, model.clip.logit_scale)
        values["rsc_encoder"] = losses.score_consistency(logits, ranking.logits)
    return values


# --- single terms ----------------------------------------------------------------------------------------------------


def _feature_distillation(embeddings: Mapping[str, Tensor], batch: Batch, random: RandomInputs) -> Tensor:
    """Mean over the image side and the text side, as far as they are embedded."""
    sides = [
        losses.feature_distillation(embeddings[side], batch.base_embeddings[side])
        for side in ("u", "v")
        if side in embeddings
    ]
    return torch.stack(sides).mean() * (len(batch) / random.pairs)


def _denoise(model: JointModel, z: Tensor, conditions: Conditions, random: RandomInputs) -> Denoising:
    t, noise = random.t.to(z.device), random.noise.to(z.device)
    alpha_bar = model.alpha_bar[t]
    z_t = losses.add_noise(z, noise, alpha_bar, model.prediction_type)
    output = model.predict(z_t, model.timesteps[t], conditions)
    target = losses.diffusion_target(z, noise, alpha_bar, model.prediction_type)
    return Denoising(alpha_bar, z_t, target, output.float())


def _synthesis(model: JointModel, denoising: Denoising, config: TrainingConfig, random: RandomInputs) -> Tensor:
    weight = losses.min_snr_weight(denoising.alpha_bar, config.min_snr_gamma, model.prediction_type)
    value = losses.synthesis(denoising.output, denoising.target, weight)
    return value * (len(denoising.output) / random.samples)


def _decode_estimates(model: JointModel, denoising: Denoising, indices: Tensor) -> Tensor:
    """x̂_0 = D(ẑ_0) of some samples, as CLIP expects images. indices: int64[k]. Returns float[k, 3, s, s]."""
    z_t, output, alpha_bar = denoising.z_t[indices], denoising.output[indices], denoising.alpha_bar[indices]
    with model.autocast():
        z_0 = losses.predict_original(z_t, output, alpha_bar, model.prediction_type)
        return model.to_clip(model.decode(z_0))


def _rsc_pixel(
    model: JointModel,
    teacher: Mapping[str, Tensor] | None,
    batch: Batch,
    denoising: Denoising,
    random: RandomInputs,
) -> Tensor:
    decoded = random.decoded.nonzero().flatten().to(batch.latents.device)
    if len(decoded) == 0:  # CLIP accepts no empty batch, so the mean is a zero with a gradient
        return 0.0 * denoising.output.sum()
    estimates = _decode_estimates(model, denoising, decoded)
    u_hat, u = _embed_by_teacher(model, teacher, estimates, batch.clip_pixels[decoded])
    return losses.rsc_pixel(u_hat, u, denoising.alpha_bar[decoded]) * (len(decoded) / random.decoded_samples)


def _embed_by_teacher(
    model: JointModel, weights: Mapping[str, Tensor] | None, estimates: Tensor, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    """Embeddings by RSC's teacher f̄: of the estimates, differentiable, and of the images themselves."""
    teacher = model.image_tower_weights(weights or {})
    with model.autocast(), model.f.as_teacher():
        u_hat = losses.gradient_only_through_input(model.f, teacher, estimates)
        with torch.no_grad():
            return u_hat, losses.gradient_only_through_input(model.f, teacher, pixels)
