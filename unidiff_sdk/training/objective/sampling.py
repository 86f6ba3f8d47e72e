"""One denoising step of a sampler table with the PyTorch model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unidiff_sdk.generation.samplers import Coefficients, advance

from .batch import Conditions
from .distillation import apply_guidance
from .joint_model import JointModel

__all__ = ["denoising_step"]


def denoising_step(
    model: JointModel,
    coefficients: Coefficients,
    x: Tensor,
    previous_x0: Tensor | None,
    conditions: Conditions,
    unconditional: Conditions,
    guidance_scale: float,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step with classifier-free guidance: (next latents, estimate of the clean latents).

    Differentiable, except for the prediction without a caption. It is a constant: otherwise a loss of the generated
    images could also be lowered by denoising worse without a caption.

    Args:
        coefficients: A row of the sampler's table.
        x: float[n, c, h, w], latents before the step.
        previous_x0: Estimate of the previous step. None at the first step.
        conditions: Those of n captions.
        unconditional: One row, see `JointModel.unconditional`.
        guidance_scale: Up to 1, guidance is off, which halves the work.
        noise: float[n, c, h, w], standard normal. None where the step adds none.
    """
    row = Coefficients(*map(float, coefficients))
    scaled, t = x * row.input_scale, torch.full((len(x),), row.timestep, device=x.device)
    output = model.predict(scaled, t, conditions).float()
    if guidance_scale > 1:
        with torch.no_grad():
            without = model.predict(scaled, t, unconditional.repeated(len(x))).float()
        output = apply_guidance(without, output, guidance_scale)
    step: Any = advance  # its arithmetic is the same for NumPy arrays and PyTorch tensors
    return step(row, x, output, previous_x0, noise)
