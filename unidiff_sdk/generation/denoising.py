"""Denoising: images at different steps of different tables take a step together, in one call of the UNet.

The UNet takes a timestep for each sample, and `samplers.advance` takes coefficients for each. So one call can serve any
jobs whose latents have the same size, whatever their samplers, steps and guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.inference.engines.adapters import Loras

from .samplers import Coefficients, Table, advance

__all__ = ["Batch", "Conditions", "Job", "KnownRegion", "Predict", "Progress", "rescale_guidance"]

Float32 = NDArray[np.float32]

Conditions = Mapping[str, Float32]
"""What a sample is conditioned on: the inputs of the UNet besides the sample and its timestep, by name. One of them is
"encoder_hidden_states", the token states of the prompt: float32[tokens, width]."""

Predict = Callable[[Float32, Float32, Conditions], Float32]
"""The UNet: (sample [batch, channels, height, width], timestep [batch], conditions, each [batch, …]) to output. The
conditions of a call include what its jobs share (`Job.shared`)."""


@dataclass(frozen=True)
class KnownRegion:
    """What inpainting keeps: `clean` latents where `repaint` is 0, with the noise of the current step.

    `clean` and `noise` are float32[channels, height, width], `repaint` float32[1, height, width] of 0 and 1.
    """

    clean: Float32
    noise: Float32
    repaint: Float32


@dataclass(eq=False)
class Job:
    """One image on its way from noise to clean latents.

    Attributes:
        table: its sampler; each step takes the next row.
        x: its latents, float32[channels, height, width].
        conditions: of the prompt.
        negative: those of the negative prompt, of the same shapes. None: no guidance, at half the work.
        guidance_scale: weight of the prompt's prediction against the negative prompt's (Ho & Salimans 2022,
            arXiv:2207.12598).
        guidance_rescale: 0 to 1, how much of the contrast that guidance adds is removed.
        rng: generates the noise that stochastic samplers add.
        known: what inpainting keeps.
        loras: the LoRAs that change the denoiser. Only jobs with the same ones can share a call.
        shared: their inputs of the UNet, which have no row for each sample.
        step: index of the next step.
        x0: the previous step's estimate of the clean latents.
    """

    table: Table
    x: Float32
    conditions: Conditions
    negative: Conditions | None
    guidance_scale: float
    guidance_rescale: float
    rng: np.random.Generator
    known: KnownRegion | None = None
    loras: Loras = ()
    shared: Conditions = field(default_factory=dict)
    step: int = 0
    x0: Float32 = field(init=False)
    shape: tuple[Any, ...] = field(init=False)  # only jobs of one shape can share a call

    def __post_init__(self) -> None:
        self.x0 = np.zeros_like(self.x)
        sides = (side for array in (self.x, *self.conditions.values()) for side in array.shape)
        self.shape = (*sides, *self.loras)

    @property
    def positions(self) -> int:
        """Number of latent positions that it adds to a call: twice its own with guidance."""
        _, height, width = self.x.shape
        return int((1 if self.negative is None else 2) * height * width)

    @property
    def finished(self) -> bool:
        return self.step == len(self.table)


class Progress:
    """How far the jobs of a request are.

    Attributes:
        done, total: steps, summed over its images.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = jobs
        self.done = sum(job.step for job in jobs)
        self.total = sum(len(job.table) for job in jobs)

    def estimates(self) -> Float32:
        """The current estimate of the clean latents: float32[images, channels, height, width]."""
        return np.stack([job.x0 for job in self._jobs])


class Batch:
    """Jobs of one shape, stacked for as long as the same ones go on together."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        # The coefficients of all jobs, for each step that they can take together; read once.
        steps = min(len(job.table) - job.step for job in jobs)
        rows = np.stack([job.table.rows[job.step : job.step + steps] for job in jobs], axis=2)[..., None, None, None]
        self._steps = (Coefficients(*row) for row in rows)
        self._x, self._x0 = np.stack([job.x for job in jobs]), np.stack([job.x0 for job in jobs])
        # In a call come the samples with a prompt, one for each job, then those with a negative prompt.
        guided = [i for i, job in enumerate(jobs) if job.negative is not None]
        self._guided: list[int] | slice = slice(None) if len(guided) == len(jobs) else guided  # a slice copies nothing
        self._guidance_scale = _column(job.guidance_scale for job in jobs)[self._guided]
        self._guidance_rescale = _column(job.guidance_rescale for job in jobs)[self._guided]
        self._rescales = bool(self._guidance_rescale.any())
        rows_of = [job.conditions for job in jobs] + [job.negative for job in jobs if job.negative is not None]
        self._conditions = {name: np.stack([each[name] for each in rows_of]) for name in jobs[0].conditions}
        self._conditions |= jobs[0].shared
        self._needs_noise = any(job.table.needs_noise for job in jobs)

    def step(self, predict: Predict) -> None:
        """Take each job one step further with one call of the UNet."""
        # 1. Predict
        coefficients = next(self._steps)
        sample, timestep = self._x * coefficients.input_scale, coefficients.timestep.ravel()
        if self._guided:
            sample = np.concatenate([sample, sample[self._guided]])
            timestep = np.concatenate([timestep, timestep[self._guided]])
        output = self._guide(predict(sample, timestep, self._conditions))

        # 2. Step
        noise = self._noise(coefficients) if self._needs_noise else None
        self._x, self._x0 = advance(coefficients, self._x, output, self._x0, noise)

        # 3. Update the jobs
        for job, x, x0 in zip(self.jobs, self._x, self._x0, strict=True):
            if job.known is not None:
                clean, noisy = job.table.levels[job.step + 1]
                x[:] = np.where(job.known.repaint, x, clean * job.known.clean + noisy * job.known.noise)
            job.x, job.x0, job.step = x, x0, job.step + 1

    def _guide(self, output: Float32) -> Float32:
        """Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) for the jobs that have it."""
        if not self._guided:
            return output
        prompted, negative = output[: len(self.jobs)], output[len(self.jobs) :]
        if isinstance(self._guided, slice):
            return self._mix(prompted, negative)
        guided = prompted.copy()
        guided[self._guided] = self._mix(prompted[self._guided], negative)
        return guided

    def _mix(self, prompted: Float32, negative: Float32) -> Float32:
        guided = prompted - negative
        guided *= self._guidance_scale
        guided += negative
        return rescale_guidance(guided, prompted, self._guidance_rescale) if self._rescales else guided

    def _noise(self, coefficients: Coefficients) -> Float32 | None:
        stochastic = np.ravel(coefficients.next_from_noise).nonzero()[0]
        if not len(stochastic):
            return None
        noise = np.zeros_like(self._x)
        for i in stochastic:
            noise[i] = self.jobs[i].rng.standard_normal(self._x.shape[1:], dtype=np.float32)
        return noise


def rescale_guidance(guided: Float32, prompted: Float32, amount: Float32) -> Float32:
    """Remove the contrast that guidance adds: Lin et al. 2023 (arXiv:2305.08891), equations 15 and 16.

    Args:
        guided, prompted: predictions with guidance and with the prompt alone, float32[batch, channels, height, width].
        amount: 0 to 1, the paper's phi; float32[batch, 1, 1, 1].
    """
    axes = tuple(range(1, guided.ndim))
    contrast = prompted.std(axis=axes, keepdims=True) / guided.std(axis=axes, keepdims=True)
    result: Float32 = guided * (amount * contrast + (1 - amount))
    return result


def _column(values: Iterable[float]) -> Float32:
    return np.array(list(values), np.float32)[:, None, None, None]
