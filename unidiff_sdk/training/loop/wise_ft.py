"""WiSE-FT: the interpolation between base and tuned weights that is best on validation pairs.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models": θ = (1-α)·θ_base + α·θ_tuned often keeps the accuracy
on the base's data and loses none on the new data. Encoder and generator have separate α, chosen by the figure that each
is used for: first the encoder's, by the validation score; then, with that encoder, the generator's, by the denoising
loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unidiff_sdk.training.config import Component
from unidiff_sdk.training.objective.tuning import component_of
from unidiff_sdk.training.runtime.callbacks import ValidationResult

from .learner import Learner

__all__ = ["ALPHAS", "interpolate", "wise_ft"]

ALPHAS = tuple(tenth / 10 for tenth in range(11))


def wise_ft(learner: Learner, base: Mapping[str, Tensor], validate: Callable[[], ValidationResult]) -> dict[str, Any]:
    """Sweep α and leave the best interpolation in the averaged weights. Among equals, the one nearest to the base.

    Args:
        base: Weights of the base, named as the averaged weights.
        validate: Measures the averaged weights.

    Returns:
        For "encoder" and "generator", if tuned: the chosen "alpha", and the "sweep", a list of (alpha, score). Higher
        scores are better.
    """
    tuned = {name: weight.clone() for name, weight in learner.ema.weights.items()}
    halves = {"encoder": {Component.TEXT, Component.IMAGE}, "generator": {Component.UNET}}
    if not learner.config.trains_encoder:
        halves = {"generator": set(Component)}
    alphas = dict.fromkeys(Component, 1.0)
    record: dict[str, Any] = {}
    for half, components in halves.items():
        if not any(component_of(name) in components for name in tuned):
            continue
        sweep = []
        for alpha in ALPHAS:
            interpolate(learner.ema.weights, base, tuned, alphas | dict.fromkeys(components, alpha))
            result = validate()
            sweep.append((alpha, result.score if half == "encoder" else -result.figures["denoising_loss"]))
        best = max(sweep, key=lambda point: point[1])[0]  # the first among equals
        alphas |= dict.fromkeys(components, best)
        record[half] = {"alpha": best, "sweep": sweep}
    interpolate(learner.ema.weights, base, tuned, alphas)
    return record


@torch.no_grad()
def interpolate(
    into: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    alphas: Mapping[Component, float],
) -> None:
    """Write (1-α)·base + α·tuned into `into`, with the α of each weight's component.

    Of adapters, only B is interpolated. The merged weights, W + B·A, then interpolate like any others, because the
    base's B is zero.
    """
    for name, weight in into.items():
        component = component_of(name)
        assert component is not None
        alpha = 1.0 if ".lora_A." in name else alphas[component]
        torch.lerp(base[name], tuned[name], alpha, out=weight)
