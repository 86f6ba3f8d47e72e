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
) -> dict[str, tuple[float, Tensor]]:
    """Compute each active term of a whole batch in one piece: {name: (λ at this step, value)}.

    Args:
        random: Random inputs of the batch.
        empty_ids: int64[1, tokens], the tokens of "".
        step: Number of the step, from 0.
    """
    output = forward(model, batch, config, random=random, empty_ids=empty_ids)
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
    embeddings_only: bool = False,
) -> ForwardOutput:
    """Run the models over a batch: per-sample terms, and the embeddings of the pairwise terms.

    embeddings_only: Skip the per-sample terms, and with them the UNet. Other arguments as in `joint_losses`.
    """
    n = len(batch.latents)
    runs_unet = n > 0 and config.lambda_is > 0 and not embeddings_only
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
    terms["is"] = _synthesis(model, batch.latents, conditions, config, random)
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
        terms["prior"] = _synthesis(model, batch.latents, conditions, config, random)
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


def _synthesis(
    model: JointModel, z: Tensor, conditions: Conditions, config: TrainingConfig, random: RandomInputs
) -> Tensor:
    t, noise = random.t.to(z.device), random.noise.to(z.device)
    alpha_bar = model.alpha_bar[t]
    z_t = losses.add_noise(z, noise, alpha_bar, model.prediction_type)
    with model.autocast():
        output = model.predict(z_t, model.timesteps[t], conditions)
    target = losses.diffusion_target(z, noise, alpha_bar, model.prediction_type)
    weight = losses.min_snr_weight(alpha_bar, config.min_snr_gamma, model.prediction_type)
    return losses.synthesis(output.float(), target, weight) * (len(z) / random.samples)
