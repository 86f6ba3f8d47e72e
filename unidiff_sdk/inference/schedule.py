"""The noise schedule that a UNet was trained with, and the timesteps that samplers use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import BundleError, OptionError

__all__ = ["PREDICTION_TYPES", "Schedule"]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SMALLEST_ALPHA_BAR = 2.0**-24  # replaces zero where sigma / alpha must stay finite; diffusers uses the same value
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a model, from diffusers' `scheduler_config.json`.

    Attributes:
        alphas_cumprod: float64[num_train_timesteps], the papers' alpha-bar: the share of signal at each timestep.
        prediction_type: what the UNet predicts, one of PREDICTION_TYPES.
        timestep_spacing, steps_offset, final_alpha_cumprod: how samplers choose timesteps.
        original_inference_steps, timestep_scaling: of latent consistency models.
    """

    alphas_cumprod: Float64
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    final_alpha_cumprod: float = 1.0
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers scheduler configuration of any class.

        `clip_sample` is ignored, as in diffusers' Stable Diffusion pipeline: it is meant for pixels.

        Raises:
            BundleError: a setting is not supported.
        """
        prediction_type = config.get("prediction_type", PREDICTION_TYPES[0])
        spacing = config.get("timestep_spacing", "leading")
        if prediction_type not in PREDICTION_TYPES:
            raise BundleError(
                f"prediction_type {prediction_type!r} is not supported; use one of {', '.join(PREDICTION_TYPES)}"
            )
        if spacing not in SPACINGS:
            raise BundleError(f"timestep_spacing {spacing!r} is not supported; use one of {', '.join(SPACINGS)}")
        if config.get("thresholding"):
            raise BundleError("a scheduler with thresholding is not supported: it is meant for pixels, not for latents")
        alphas_cumprod = _alphas_cumprod(config)
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=int(config.get("steps_offset", 0)),
            final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0]),
            original_inference_steps=int(config.get("original_inference_steps", 50)),
            timestep_scaling=float(config.get("timestep_scaling", 10.0)),
        )

    @property
    def num_train_timesteps(self) -> int:
        """Number of noise levels in training. Timesteps run from 0 (clean) to this minus 1."""
        return len(self.alphas_cumprod)

    @property
    def noise_levels(self) -> Float64:
        """sigma / alpha at each training timestep, rising: float64[num_train_timesteps]."""
        alphas_cumprod = np.where(self.alphas_cumprod > 0, self.alphas_cumprod, SMALLEST_ALPHA_BAR)
        levels: Float64 = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
        return levels

    def timesteps(self, steps: int, *, left_out: int = 0) -> Float64:
        """`steps` descending timesteps, spaced as in table 2 of Lin et al. 2023 (arXiv:2305.08891).

        `left_out` timesteps at the clean end count in the spacing, but are not returned (except by "trailing").
        """
        total, points = self.num_train_timesteps, steps + left_out
        if not 1 <= steps <= total - left_out:
            raise OptionError(f"steps is {steps}; this sampler supports 1 to {total - left_out} with this model")
        if self.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, points)[::-1][:steps]
        if self.timestep_spacing == "trailing":
            # sliced, because rounding can make arange one longer
            return np.arange(total, 0, -total / steps).round()[:steps] - 1
        spaced = np.arange(points, dtype=np.float64) * (total // points)
        timesteps = spaced[::-1][:steps] + self.steps_offset
        if timesteps[0] >= total:
            raise OptionError(f"steps is {steps}, which starts beyond the model's {total} timesteps; give fewer")
        return timesteps


def _alphas_cumprod(config: Mapping[str, Any]) -> Float64:
    """alpha-bar in the float32 arithmetic of training, because the model was trained with its rounding errors."""
    total = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    betas: Float32
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], np.float32)
    elif kind == "linear":
        betas = _linspace32(start, end, total)
    elif kind == "scaled_linear":
        betas = _linspace32(start**0.5, end**0.5, total) ** 2
    elif kind == "squaredcos_cap_v2":
        alpha_bar = [math.cos((i / total + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(total + 1)]
        betas = np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], 0.999) for i in range(total)], np.float32)
    else:
        raise BundleError(f"beta_schedule {kind!r} is not supported; use linear, scaled_linear or squaredcos_cap_v2")
    alphas_cumprod = _cumprod32(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    return alphas_cumprod.astype(np.float64)


def _linspace32(start: float, end: float, count: int) -> Float32:
    """torch.linspace in float32, bit for bit: counted from both ends, each product and sum rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def _cumprod32(factors: Float32) -> Float32:
    """torch.cumprod in float32, bit for bit: it multiplies in double."""
    return np.cumprod(factors, dtype=np.float64).astype(np.float32)


def _zero_terminal_snr(alphas_cumprod: Float32) -> Float32:
    """Shift and scale alpha so that the last step is pure noise (Lin et al. 2023, algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    bar = root**2
    # diffusers converts to betas and multiplies them again: repeated here for the same rounding
    return _cumprod32(np.concatenate([bar[:1], bar[1:] / bar[:-1]]))
