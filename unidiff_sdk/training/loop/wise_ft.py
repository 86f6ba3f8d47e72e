"""WiSE-FT: between the base's weights and the tuned ones, the mixture that is best on validation pairs.

Wortsman et al. 2022, "Robust fine-tuning of zero-shot models": θ = (1-α)·θ_base + α·θ_tuned often keeps what the base
knew and loses nothing of what was learned. The encoder and the generator have an α each, by what each is for: first
the encoder's, by the look's score; then, with that encoder, the generator's, by the denoising loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from unidiff_sdk.training.config import Part
from unidiff_sdk.training.objective.tuning import part_of
from unidiff_sdk.training.runtime.callbacks import Validated

from .learner import Learner

__all__ = ["ALPHAS", "interpolate", "wise_ft"]

ALPHAS = tuple(tenth / 10 for tenth in range(11))


def wise_ft(learner: Learner, base: Mapping[str, Tensor], look: Callable[[], Validated]) -> dict[str, Any]:
    """Sweep α and leave the best mixture in the averaged weights; of equals, the one nearest to the base.

    base: named as the averaged weights. look: measures the averaged weights. Returns for "encoder" and "generator", as
    far as they were tuned, the chosen "alpha" and the "sweep", a list of (alpha, score), higher is better.
    """
    tuned = {name: weight.clone() for name, weight in learner.ema.weights.items()}
    halves = {"encoder": {Part.TEXT, Part.IMAGE}, "generator": {Part.UNET}}
    if not learner.config.trains_encoder:
        halves = {"generator": set(Part)}
    alphas = dict.fromkeys(Part, 1.0)
    record: dict[str, Any] = {}
    for half, parts in halves.items():
        if not any(part_of(name) in parts for name in tuned):
            continue
        sweep = []
        for alpha in ALPHAS:
            interpolate(learner.ema.weights, base, tuned, alphas | dict.fromkeys(parts, alpha))
            seen = look()
            sweep.append((alpha, seen.score if half == "encoder" else -seen.figures["denoising_loss"]))
        best = max(sweep, key=lambda point: point[1])[0]  # the first of equals
        alphas |= dict.fromkeys(parts, best)
        record[half] = {"alpha": best, "sweep": sweep}
    interpolate(learner.ema.weights, base, tuned, alphas)
    return record


@torch.no_grad()
def interpolate(
    into: Mapping[str, Tensor], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], alphas: Mapping[Part, float]
) -> None:
    """(1-α)·base + α·tuned, with the α of each weight's part.

    Of adapters only B is mixed, so that the weights they are merged into, W + B·A, are mixed as any other: the base's B
    is zero.
    """
    for name, weight in into.items():
        part = part_of(name)
        assert part is not None
        alpha = 1.0 if ".lora_A." in name else alphas[part]
        torch.lerp(base[name], tuned[name], alpha, out=weight)
