"""The denoising error of an image under a text: how badly the UNet denoises the image when it is conditioned on it.

With the latents z of an image x and the conditions of a text y, its token states,

    e(x, y) = mean over t of ‖target_t - ε_θ(z_t, t, y)‖² / size        z_t = √ᾱ_t z + √(1 - ᾱ_t) ε

The target is the noise ε or the velocity, as the UNet was trained. A flow matching model has z_t = (1 - σ) z + σ ε and
the target ε - z. The timesteps t are few and of high noise: there the text decides what the UNet sees, while at low
noise z_t itself shows it. Every image and text is measured with the same noise ε, so that differences between errors
are differences between images and texts.

Sources of the idea: Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv:2303.16203), and
Krojer et al. 2023, "Are Diffusion Models Vision-And-Language Reasoners?" (arXiv:2305.16397).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from unidiff_sdk._internal.parallel import batched
from unidiff_sdk.inference.schedule import FlowSchedule, Schedule

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Denoiser", "DenoisingError", "NoisePredictor", "Row", "noise_of"]

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

Conditions = Any
"""What conditions a UNet on a text. Its denoiser makes and reads it: token states, or inputs of the UNet by name."""

# Rows that are submitted at once, which bounds the memory of inputs. The predictor divides them into calls of the UNet.
ROWS_AT_ONCE = 128
_CACHED_NOISE = 32


class NoisePredictor(Protocol):
    """The UNet that errors are measured with."""

    def predict(
        self, samples: Sequence[Float32], timesteps: Sequence[int], conditions: Sequence[Conditions]
    ) -> Float32:
        """The UNet's output for each sample with noise, float32[len(samples), channels, height, width]."""


class Denoiser(NoisePredictor, Protocol):
    """A UNet with the encoders of its inputs: `generation.generator.Generator`."""

    def latents(self, image: Image.Image) -> Float32:
        """The latents of an image, float32[channels, height, width]."""

    def conditions(self, text: str) -> Conditions:
        """What conditions the UNet on a text; on none, if it is empty."""


class Row(NamedTuple):
    """One error to measure: latents of an image, float[channels, height, width], at a timestep, under a text."""

    latents: npt.NDArray[Any]
    timestep: int
    conditions: Conditions


class DenoisingError:
    """Measures denoising errors. May be shared between threads.

    Args:
        unet: the UNet.
        schedule: its noise schedule and prediction type.
        noise_seed: the seed of the noise. The noise of a timestep does not depend on the other timesteps.
    """

    def __init__(self, unet: NoisePredictor, schedule: Schedule | FlowSchedule, noise_seed: int) -> None:
        self._unet, self._schedule, self._seed = unet, schedule, noise_seed
        self._noise = lru_cache(_CACHED_NOISE)(partial(noise_of, noise_seed))

    def measure(self, rows: Sequence[Row]) -> Float64:
        """The error of each row: the mean square over the elements of its latents, float64[len(rows)].

        Raises:
            GenerationError: the UNet failed.
            BusyError: too many generations are running.
        """
        errors = [np.empty(0)]
        for some in batched(rows, ROWS_AT_ONCE):
            samples, targets = zip(*map(self._noisy, some), strict=True)
            outputs = self._unet.predict(samples, [row.timestep for row in some], [row.conditions for row in some])
            errors.append(np.square(outputs - np.stack(targets)).mean(axis=(1, 2, 3), dtype=np.float64))
        return np.concatenate(errors)

    def _noisy(self, row: Row) -> tuple[Float32, Float32]:
        """The latents with noise, and the output that the UNet was trained to return for them."""
        clean, noise = row.latents.astype(np.float32), self._noise(row.timestep, row.latents.shape)
        (of_clean, of_noise), (target_of_clean, target_of_noise) = (
            map(np.float32, shares)
            for shares in (self._schedule.shares(row.timestep), self._schedule.target_shares(row.timestep))
        )
        return of_clean * clean + of_noise * noise, target_of_clean * clean + target_of_noise * noise


def noise_of(seed: int, timestep: int, shape: tuple[int, ...]) -> Float32:
    """The standard normal noise of a timestep, float32 of the given shape, the same on every machine."""
    key = np.array([seed, timestep], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
