"""A sampler is a table: for a noise schedule and a number of steps, one row of coefficients for each step.

Every sampler here is linear in the current latents x, the UNet's output, the previous estimate of the clean latents and
fresh noise. So one step is the same two lines for all of them (see `advance`):

    x0 = x0_from_x * x + x0_from_output * output
    x  = next_from_x * x + next_from_x0 * x0 + next_from_previous_x0 * previous_x0 + next_from_noise * noise

Each table is tested against the diffusers scheduler with the same settings, over whole trajectories. Where the model
states no timestep spacing, it is the default of that scheduler. Symbols are those of the papers:
x = alpha * x0 + sigma * noise with alpha² + sigma² = 1 ("variance preserving"). The Euler samplers work on x / alpha,
where only the noise level sigma / alpha changes ("variance exploding"). Flow matching models have samplers of their
own: there x = (1 - sigma) * x0 + sigma * noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import OptionError
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule

__all__ = [
    "FLOW_SAMPLERS",
    "SAMPLERS",
    "Coefficients",
    "Table",
    "advance",
    "ddim",
    "dpmpp_2m",
    "euler",
    "euler_ancestral",
    "flow_euler",
    "lcm",
    "make_table",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

LCM_SIGMA_DATA = 0.5
KARRAS_RHO = 7.0


# Tables


class Coefficients(NamedTuple):
    """The coefficients of one step: scalars, or arrays [batch, 1, 1, 1] for samples at different steps."""

    timestep: Any
    input_scale: Any
    x0_from_x: Any
    x0_from_output: Any
    next_from_x: Any
    next_from_x0: Any
    next_from_previous_x0: Any
    next_from_noise: Any


NEXT_FROM_X0 = Coefficients._fields.index("next_from_x0")
NEXT_FROM_PREVIOUS_X0 = Coefficients._fields.index("next_from_previous_x0")


@dataclass(frozen=True)
class Table:
    """All steps of a generation.

    Attributes:
        rows: float32[steps, 8]; the columns are the fields of `Coefficients`.
        init_noise_sigma: scale of the standard normal noise that a generation starts from.
        levels: float32[steps + 1, 2]: the shares of clean latents and of standard normal noise in x, before each step
            and after the last.
    """

    rows: Float32
    init_noise_sigma: float
    levels: Float32

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> Coefficients:
        return Coefficients(*self.rows[step])

    @property
    def needs_noise(self) -> bool:
        """Whether any step adds fresh noise."""
        return bool(self.rows[:, -1].any())

    def starting_at(self, step: int) -> Table:
        """The table without its first `step` steps, for a generation that starts from an image.

        The first remaining step has no previous estimate. It uses its own, which makes it a step of first order.
        """
        rows = self.rows[step:].copy()
        rows[0, NEXT_FROM_X0] += rows[0, NEXT_FROM_PREVIOUS_X0]
        rows[0, NEXT_FROM_PREVIOUS_X0] = 0
        return Table(rows, self.init_noise_sigma, self.levels[step:])


def advance(
    row: Coefficients, x: Float32, output: Float32, previous_x0: Float32 | None, noise: Float32 | None
) -> tuple[Float32, Float32]:
    """One denoising step: (next x, estimate of the clean latents).

    Args:
        row: the coefficients of the step.
        x: latents, float32[batch, channels, height, width].
        output: the UNet's prediction from `x * row.input_scale` at `row.timestep`; the same shape.
        previous_x0: the estimate of the previous step, for multistep samplers; None at the first step.
        noise: standard normal noise of the same shape; None where the step adds none.
    """
    x0 = row.x0_from_x * x + row.x0_from_output * output
    x = row.next_from_x * x + row.next_from_x0 * x0
    if previous_x0 is not None:
        x += row.next_from_previous_x0 * previous_x0
    if noise is not None:
        x += row.next_from_noise * noise
    return x, x0


def _table(clean: Float64 | float, noise: Float64, init_noise_sigma: float = 1.0, **columns: Any) -> Table:
    """A table from its columns, each an array [steps] or a scalar; missing ones are 0.

    `clean` and `noise` are the levels before each step. After the last step, only clean latents are left.
    """
    values = [columns.pop(name, 0.0) for name in Coefficients._fields]
    assert not columns, f"not columns of a sampler table: {sorted(columns)}"
    rows = np.stack(np.broadcast_arrays(*values), axis=1).astype(np.float32)
    levels = np.stack(np.broadcast_arrays(clean, noise), axis=1)
    levels = np.append(levels, [[1.0, 0.0]], axis=0).astype(np.float32)
    return Table(rows, float(init_noise_sigma), levels)


def _predict_x0(schedule: Schedule, alpha: Float64, sigma: Float64) -> tuple[Float64, Float64]:
    """The coefficients of x and of the UNet's output in the estimate of the clean latents, by the prediction type."""
    if schedule.prediction_type == "v_prediction":  # v = alpha * noise - sigma * x0
        return alpha, -sigma
    if not alpha.all():
        raise OptionError("a model that predicts epsilon cannot start from pure noise (zero terminal SNR)")
    return 1 / alpha, -sigma / alpha


def prediction(timestep: float) -> Table:
    """A table of one step, after which x is the UNet's output at `timestep` itself: to measure it, not to sample."""
    return _table(0.0, np.ones(1), timestep=np.array([timestep]), input_scale=1.0, x0_from_output=1.0, next_from_x0=1.0)


# Samplers


def ddim(schedule: Schedule, steps: int) -> Table:
    """Song et al. 2021, "Denoising Diffusion Implicit Models" (arXiv:2010.02502), equation 12 with eta = 0."""
    timestep = schedule.spaced("leading").timesteps(steps).round().astype(int)
    timestep_next = timestep - schedule.num_train_timesteps // steps
    bar = schedule.alphas_cumprod[timestep]
    bar_next = np.where(timestep_next >= 0, schedule.alphas_cumprod[timestep_next], schedule.final_alpha_cumprod)
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    alpha_next, sigma_next = np.sqrt(bar_next), np.sqrt(1 - bar_next)
    x0_from_x, x0_from_output = _predict_x0(schedule, alpha, sigma)
    # x_next = alpha_next * x0 + sigma_next * noise, with noise = (x - alpha * x0) / sigma
    return _table(
        alpha,
        sigma,
        timestep=timestep,
        input_scale=1.0,
        x0_from_x=x0_from_x,
        x0_from_output=x0_from_output,
        next_from_x=sigma_next / sigma,
        next_from_x0=alpha_next - alpha * sigma_next / sigma,
    )


def euler(schedule: Schedule, steps: int, *, karras: bool = False) -> Table:
    """Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (arXiv:2206.00364).

    Algorithm 1 without churn, by Euler's method. `karras` spaces the noise levels by equation 5.
    """
    timestep, level = _euler_levels(schedule, steps, karras)
    return _euler_table(schedule, timestep, level, target=level[1:], noise=np.zeros(steps))


def euler_ancestral(schedule: Schedule, steps: int) -> Table:
    """Euler's method with ancestral noise: `sample_euler_ancestral` of k-diffusion."""
    timestep, level = _euler_levels(schedule, steps, karras=False)
    here, there = level[:-1], level[1:]
    up = there * np.sqrt(here**2 - there**2) / here
    down = np.sqrt(there**2 - up**2)
    return _euler_table(schedule, timestep, level, target=down, noise=up)


def dpmpp_2m(schedule: Schedule, steps: int, *, karras: bool = False) -> Table:
    """Lu et al. 2022, "DPM-Solver++" (arXiv:2211.01095), algorithm 2, midpoint. The first and last step are of order 1.

    `karras` spaces the noise levels as in `euler`, over the whole range of the model.
    """
    levels = schedule.noise_levels
    timestep = schedule.spaced("linspace").timesteps(steps, left_out=1).round()
    level = levels[timestep.astype(int)]
    if karras:
        level = _karras(levels[-1], levels[0], steps)
        timestep = _timestep_of(level, levels).round()
    level_next = np.append(level[1:], 0.0)
    alpha, alpha_next = 1 / np.sqrt(level**2 + 1), 1 / np.sqrt(level_next**2 + 1)
    x0_from_x, x0_from_output = _predict_x0(schedule, alpha, alpha * level)
    change = 1 - level_next / level  # 1 - exp(-h), where h is the step in log signal-to-noise ratio
    look_back = np.zeros(steps)
    if steps > 2:
        log_level = np.log(level)
        h_previous, h = -np.diff(log_level)[:-1], -np.diff(log_level)[1:]
        look_back[1:-1] = 0.5 * h / h_previous  # 1 / (2 r), the weight of the change of x0 since the previous step
    return _table(
        alpha,
        alpha * level,
        timestep=timestep,
        input_scale=1.0,
        x0_from_x=x0_from_x,
        x0_from_output=x0_from_output,
        next_from_x=(alpha_next * level_next) / (alpha * level),
        next_from_x0=alpha_next * change * (1 + look_back),
        next_from_previous_x0=-alpha_next * change * look_back,
    )


def lcm(schedule: Schedule, steps: int) -> Table:
    """Luo et al. 2023, "Latent Consistency Models" (arXiv:2310.04378), algorithm 3, for UNets distilled for it."""
    total, original = schedule.num_train_timesteps, schedule.original_inference_steps
    if not 1 <= steps <= original:
        raise OptionError(f"steps is {steps}; the lcm sampler supports 1 to {original} with this model")
    trained = np.arange(original, 0, -1) * (total // original) - 1
    timestep = trained[np.linspace(0, original, steps, endpoint=False).astype(int)]
    bar = schedule.alphas_cumprod[timestep]
    alpha, sigma = np.sqrt(bar), np.sqrt(1 - bar)
    x0_from_x, x0_from_output = _predict_x0(schedule, alpha, sigma)
    scaled = timestep * schedule.timestep_scaling
    skip = LCM_SIGMA_DATA**2 / (scaled**2 + LCM_SIGMA_DATA**2)
    out = scaled / np.sqrt(scaled**2 + LCM_SIGMA_DATA**2)
    bar_next = np.append(bar[1:], 1.0)  # the last step returns what it denoised
    return _table(
        alpha,
        sigma,
        timestep=timestep,
        input_scale=1.0,
        x0_from_x=x0_from_x,
        x0_from_output=x0_from_output,
        next_from_x=np.sqrt(bar_next) * skip,
        next_from_x0=np.sqrt(bar_next) * out,
        next_from_noise=np.sqrt(1 - bar_next),
    )


def flow_euler(schedule: FlowSchedule, steps: int) -> Table:
    """Euler's method for flow matching, where dx / dsigma is the velocity that the model predicts.

    Esser et al. 2024 (arXiv:2403.03206), section 2, with the levels of `FlowSchedule.sigmas`.
    """
    sigma = schedule.sigmas(steps)
    here = sigma.astype(np.float64)
    there = np.append(here[1:], 0.0)
    # x0 = x - sigma * velocity, so x + (there - here) * velocity lies on the line from x to x0
    return _table(
        1 - here,
        here,
        timestep=sigma * np.float32(schedule.num_train_timesteps),
        input_scale=1.0,
        x0_from_x=1.0,
        x0_from_output=-here,
        next_from_x=there / here,
        next_from_x0=1 - there / here,
    )


def _euler_levels(schedule: Schedule, steps: int, karras: bool) -> tuple[Float64, Float64]:
    """Fractional timesteps, and noise levels with a final 0: float64[steps], float64[steps + 1]."""
    levels = schedule.noise_levels
    timestep = schedule.spaced("linspace").timesteps(steps)
    level = np.interp(timestep, np.arange(len(levels)), levels)
    if karras:
        level = _karras(level[0], level[-1], steps)
        timestep = _timestep_of(level, levels)
    return timestep, np.append(level, 0.0)


def _euler_table(schedule: Schedule, timestep: Float64, level: Float64, target: Float64, noise: Float64) -> Table:
    """From each noise level straight to `target`, then `noise` is added. x is scaled by 1 / alpha throughout."""
    here = level[:-1]
    alpha = 1 / np.sqrt(here**2 + 1)
    x0_from_x, x0_from_output = _predict_x0(schedule, alpha, alpha * here)
    highest = level.max()
    return _table(
        1.0,
        here,
        init_noise_sigma=math.hypot(highest, 1.0) if schedule.timestep_spacing == "leading" else highest,
        timestep=timestep,
        input_scale=alpha,
        x0_from_x=x0_from_x * alpha,
        x0_from_output=x0_from_output,
        next_from_x=target / here,
        next_from_x0=1 - target / here,
        next_from_noise=noise,
    )


def _karras(highest: float, lowest: float, steps: int) -> Float64:
    """Noise levels evenly spaced in their 7th root: Karras et al. 2022, equation 5."""
    return np.linspace(highest ** (1 / KARRAS_RHO), lowest ** (1 / KARRAS_RHO), steps) ** KARRAS_RHO


def _timestep_of(level: Float64, levels: Float64) -> Float64:
    """The fractional timestep of each noise level, linear in its logarithm."""
    return np.interp(np.log(level), np.log(levels), np.arange(len(levels)))


SAMPLERS: dict[str, Callable[[Schedule, int], Table]] = {
    "ddim": ddim,
    "euler": euler,
    "euler_karras": partial(euler, karras=True),
    "euler_a": euler_ancestral,
    "dpm++2m": dpmpp_2m,
    "dpm++2m_karras": partial(dpmpp_2m, karras=True),
    "lcm": lcm,
}


FLOW_SAMPLERS: dict[str, Callable[[FlowSchedule, int], Table]] = {"flow_euler": flow_euler}
"""The samplers of flow matching models, which no other sampler can generate with."""


def make_table(sampler: str, schedule: Schedule | FlowSchedule, steps: int) -> Table:
    """The table of the sampler of that name.

    Raises:
        OptionError: the model has no such sampler, or it does not support this number of steps with this schedule.
    """
    known: dict[str, Callable[[Any, int], Table]] = FLOW_SAMPLERS if isinstance(schedule, FlowSchedule) else SAMPLERS
    if sampler in known:
        return known[sampler](schedule, steps)
    kind = ""
    if sampler in SAMPLERS or sampler in FLOW_SAMPLERS:
        kind = f", which is for {'' if sampler in FLOW_SAMPLERS else 'other models than '}flow matching models"
    raise OptionError(f"sampler is {sampler!r}{kind}; use one of {', '.join(known)}")
