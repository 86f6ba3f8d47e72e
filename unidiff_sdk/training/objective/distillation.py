"""Distillation to few steps: one step of the student lands where several guided steps of its teacher land.

The teacher walks whole trajectories from noise to picture, guided, in small steps. The student's sampler has only a few
large ones; each of them, from z_t to z_s, spans several of the teacher's. Of every trajectory the points z_t at which
the student's steps begin and end are recorded, and the student learns, without guidance, the jump from each to the
next. It is progressive distillation (Salimans & Ho 2022, arXiv:2202.00512) of a guided model (Meng et al. 2023,
arXiv:2210.03142) in one stage instead of a cascade of halvings, on pairs that the teacher draws itself (Luhman & Luhman
2021, arXiv:2101.02388), within the segments of multistep consistency models (Heek et al. 2024, arXiv:2403.06807).

A sampler's step is a row of its table, the very one that the runtime denoises by, so that what is learned is what is
used. z_t: latents float[n, c, h, w]; ᾱ_t: the noise schedule; x̂0: the student's estimate of the clean latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff_sdk.generation.samplers import Coefficients, Table, make_table
from unidiff_sdk.inference.schedule import Schedule

from . import losses

__all__ = [
    "STUDENT_SAMPLER",
    "TEACHER_SAMPLER",
    "distillation",
    "guided",
    "rows_of",
    "tables",
    "target_x0",
    "truncated_snr_weight",
]

# Deterministic and of first order: the landing point is linear in x̂0, and nothing but z_t leads to it.
STUDENT_SAMPLER = "ddim"
TEACHER_SAMPLER = "dpm++2m"


def tables(schedule: Schedule, student_steps: int, teacher_steps: int) -> tuple[Table, Table]:
    """The student's sampler and the teacher's, whose step k·i starts where the student's step i does, k their quotient.

    schedule: of trailing spacing, else the two would not start at the same noise.

    Raises OptionError where the schedule does not take so many steps.
    """
    return make_table(STUDENT_SAMPLER, schedule, student_steps), make_table(TEACHER_SAMPLER, schedule, teacher_steps)


def rows_of(table: Table, step: Tensor) -> Coefficients:
    """The coefficients of each sample at its own step. step: int64[n]. Returns Coefficients of float[n, 1, 1, 1]."""
    rows = torch.from_numpy(table.rows).to(step.device)[step]
    return Coefficients(*rows.T[:, :, None, None, None])


def guided(unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
    """ε_∅ + w·(ε_y - ε_∅): classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598)."""
    return unconditional + guidance_scale * (conditional - unconditional)


def target_x0(row: Coefficients, z_t: Tensor, z_s: Tensor) -> Tensor:
    """The x̂0 with which the student's step from z_t ends in z_s.

    Salimans & Ho 2022, appendix G: (z_s - σ_s/σ_t·z_t) / (α_s - α_t·σ_s/σ_t), whose coefficients the row holds.
    """
    return (z_s - row.next_from_x * z_t) / row.next_from_x0


def truncated_snr_weight(alpha_bar: Tensor) -> Tensor:
    """max(SNR, 1), SNR = ᾱ_t/(1-ᾱ_t): of ε's weight, SNR, what does not vanish at the noisy end.

    Salimans & Ho 2022, section 4. alpha_bar: float[n], below 1.
    """
    return (alpha_bar / (1 - alpha_bar)).clamp(min=1.0)


def distillation(row: Coefficients, z_t: Tensor, output: Tensor, z_s: Tensor, alpha_bar: Tensor) -> Tensor:
    """E max(SNR, 1)·‖x̂0 - x̃0‖², x̂0 the student's estimate and x̃0 that which leads to the teacher's z_s.

    row: of the student's table at each sample's step (`rows_of`). output: what the UNet answers to z_t, ε or v as the
    table has it. z_s: where the teacher has landed. alpha_bar: float[n], at t.
    """
    x0 = row.x0_from_x * z_t + row.x0_from_output * output
    return losses.synthesis(x0, target_x0(row, z_t, z_s), truncated_snr_weight(alpha_bar))
