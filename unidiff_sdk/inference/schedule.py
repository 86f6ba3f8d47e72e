"""The noise schedule that a UNet was trained with, the timesteps that samplers use, and the sampler of a scheduler.

All three are read from diffusers' `scheduler_config.json`. Where the file leaves out a setting, the default of a class
of diffusers holds: for the noise schedule the file's own class, for the choice of timesteps that of the sampler.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.json_values import number_within
from unidiff_sdk.errors import BundleError, OptionError

__all__ = [
    "PREDICTION_TYPES",
    "FlowSchedule",
    "SamplerChoice",
    "Schedule",
    "flow_refusal",
    "replacement_notice",
    "sampler_choice",
    "scheduler_refusal",
    "stated_settings",
]

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SMALLEST_ALPHA_BAR = 2.0**-24  # replaces zero where sigma / alpha must stay finite; diffusers uses the same value
PREDICTION_TYPES = ("epsilon", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
MAX_TIMESTEPS = 100_000  # in training; models have 1,000
BETA_RANGE = (1e-9, 0.9999)
"""The smallest and largest share of noise that a timestep can add."""
SHIFT_RANGE = (1e-3, 1e3)
"""The smallest and largest shift of a flow matching model; Stable Diffusion 3 has 3."""

# Noise schedules of diffusers' scheduler classes, where their configuration states none.
BETAS: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
LATENT_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear"}
CLASS_BETAS: dict[str, dict[str, Any]] = {
    "DPMSolverSDEScheduler": LATENT_BETAS,
    "HeunDiscreteScheduler": LATENT_BETAS,
    "KDPM2AncestralDiscreteScheduler": LATENT_BETAS,
    "KDPM2DiscreteScheduler": LATENT_BETAS,
    "LCMScheduler": LATENT_BETAS | {"beta_schedule": "scaled_linear"},
}

# Settings of the sampler, not of the trained model. Where the file leaves them out, the sampler decides.
SAMPLER_SETTINGS = ("timestep_spacing", "steps_offset", "set_alpha_to_one")


@dataclass(frozen=True)
class Schedule:
    """The noise schedule of a model, from diffusers' `scheduler_config.json`.

    Attributes:
        alphas_cumprod: float64[num_train_timesteps], the papers' alpha-bar: the share of signal at each timestep.
        prediction_type: what the UNet predicts, one of PREDICTION_TYPES.
        timestep_spacing, steps_offset, final_alpha_cumprod: how samplers choose timesteps. A spacing of None leaves
            it to the sampler, see `spaced`.
        original_inference_steps, timestep_scaling: of latent consistency models.
    """

    alphas_cumprod: Float64
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    steps_offset: int = 0
    final_alpha_cumprod: float = 1.0
    original_inference_steps: int = 50
    timestep_scaling: float = 10.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """Read a diffusers scheduler configuration of any class.

        `clip_sample` is ignored, as in diffusers' Stable Diffusion pipeline: it is meant for pixels.

        Raises:
            BundleError: a setting is not supported, or is of another type or size than a scheduler can have.
        """
        prediction_type = config.get("prediction_type", PREDICTION_TYPES[0])
        spacing = config.get("timestep_spacing")
        if prediction_type not in PREDICTION_TYPES:
            raise BundleError(
                f"prediction_type {prediction_type!r} is not supported; use one of {', '.join(PREDICTION_TYPES)}"
            )
        if spacing is not None and spacing not in SPACINGS:
            raise BundleError(f"timestep_spacing {spacing!r} is not supported; use one of {', '.join(SPACINGS)}")
        if config.get("thresholding"):
            raise BundleError("a scheduler with thresholding is not supported: it is meant for pixels, not for latents")
        alphas_cumprod = _alphas_cumprod(config)
        total = len(alphas_cumprod)
        return cls(
            alphas_cumprod=alphas_cumprod,
            prediction_type=prediction_type,
            timestep_spacing=spacing,
            steps_offset=_integer(config, "steps_offset", 0, 0, total),
            final_alpha_cumprod=1.0 if config.get("set_alpha_to_one", True) else float(alphas_cumprod[0]),
            # 50 is the default of diffusers, also for models with fewer timesteps, which lcm is not meant for.
            original_inference_steps=_integer(config, "original_inference_steps", min(50, total), 1, total),
            timestep_scaling=_number(config, "timestep_scaling", 10.0, 1e-6, 1e6),
        )

    @classmethod
    def from_pipeline(cls, config: Mapping[str, Any]) -> Schedule:
        """The same as diffusers' Stable Diffusion pipeline reads it: `steps_offset` is 1, whatever the file states."""
        return replace(cls.from_config(config), steps_offset=1)

    def spaced(self, spacing: str) -> Schedule:
        """This schedule with a timestep spacing, unless it has one."""
        return self if self.timestep_spacing else replace(self, timestep_spacing=spacing)

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

    def shares(self, timestep: int) -> tuple[float, float]:
        """The shares of clean latents and of standard normal noise in what the UNet takes at a timestep."""
        bar = float(self.alphas_cumprod[timestep])
        return math.sqrt(bar), math.sqrt(1 - bar)

    def target_shares(self, timestep: int) -> tuple[float, float]:
        """The shares of clean latents and of noise in what the UNet was trained to return at a timestep."""
        clean, noise = self.shares(timestep)
        return (-noise, clean) if self.prediction_type == "v_prediction" else (0.0, 1.0)


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels of a flow matching model, from diffusers' `scheduler_config.json`.

    Esser et al. 2024, "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (arXiv:2403.03206):
    latents with noise are (1 - sigma) * x0 + sigma * noise, and the model predicts the velocity noise - x0.

    Attributes:
        num_train_timesteps: the timestep of a noise level is sigma times this number.
        shift: above 1, sampling takes more of its steps at high noise (equation 23: the square root of m / n).
    """

    num_train_timesteps: int = 1000
    shift: float = 1.0
    prediction_type: ClassVar[str] = "flow"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowSchedule:
        """Read the configuration of a diffusers FlowMatchEulerDiscreteScheduler.

        Raises:
            BundleError: the scheduler or one of its options is not supported.
        """
        if refused := flow_refusal(config):
            raise BundleError(refused)
        return cls(
            num_train_timesteps=_integer(config, "num_train_timesteps", 1000, 1, MAX_TIMESTEPS),
            shift=_number(config, "shift", 1.0, *SHIFT_RANGE),
        )

    def sigmas(self, steps: int) -> Float32:
        """The noise level before each of `steps` steps, falling: float32[steps], as diffusers computes them.

        Raises:
            OptionError: the number of steps is not from 1 to `num_train_timesteps`.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise OptionError(f"steps is {steps}; this sampler supports 1 to {total} with this model")
        # diffusers shifts twice: first in float32 the range of the levels, then in float64 the levels of the steps
        highest, lowest = self._shifted(np.array([total, 1], np.float32) / np.float32(total))
        levels = np.linspace(float(highest) * total, float(lowest) * total, steps) / total
        return self._shifted(levels).astype(np.float32)

    def _shifted(self, sigma: NDArray[Any]) -> NDArray[Any]:
        shifted: NDArray[Any] = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return shifted

    def shares(self, timestep: int) -> tuple[float, float]:
        """As `Schedule.shares`: linear in the timestep."""
        sigma = timestep / self.num_train_timesteps
        return 1 - sigma, sigma

    def target_shares(self, timestep: int) -> tuple[float, float]:
        """As `Schedule.target_shares`: the velocity, which is the same at all timesteps."""
        return -1.0, 1.0


def _integer(config: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    return int(number_within(name, config.get(name, default), low, high, BundleError, whole=True))


def _number(config: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    return number_within(name, config.get(name, default), low, high, BundleError)


def _alphas_cumprod(config: Mapping[str, Any]) -> Float64:
    """alpha-bar in the float32 arithmetic of training, because the model was trained with its rounding errors."""
    config = BETAS | CLASS_BETAS.get(str(config.get("_class_name")), {}) | dict(config)
    total = _integer(config, "num_train_timesteps", 1000, 1, MAX_TIMESTEPS)
    start, end = (number_within(name, config[name], *BETA_RANGE, BundleError) for name in ("beta_start", "beta_end"))
    kind = config["beta_schedule"]
    betas: Float32
    if (trained := config.get("trained_betas")) is not None:
        trained = trained.tolist() if isinstance(trained, np.ndarray) else trained  # diffusers accepts both
        if not isinstance(trained, (list, tuple)) or not 0 < len(trained) <= MAX_TIMESTEPS:
            raise BundleError(f"trained_betas is {trained!r:.60}; it must be a list of 1 to {MAX_TIMESTEPS} numbers")
        for beta in trained:
            number_within("trained_betas", beta, *BETA_RANGE, BundleError)
        betas = np.asarray(trained, np.float32)
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
        if alphas_cumprod[0] == alphas_cumprod[-1]:
            raise BundleError("rescale_betas_zero_snr needs a noise schedule of more than one noise level")
        alphas_cumprod = _zero_terminal_snr(alphas_cumprod)
    if not (np.diff(alphas_cumprod) < 0).all():  # samplers divide by the differences
        raise BundleError(f"the noise schedule ({kind!r:.40}) does not add noise at each of its {total} timesteps")
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


# The sampler of a scheduler

# Schedulers of diffusers whose sampler the runtime has.
FOLLOWED_SCHEDULERS = {
    "DDIMParallelScheduler": "ddim",
    "DDIMScheduler": "ddim",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "EulerDiscreteScheduler": "euler",
    "LCMScheduler": "lcm",
}
# Schedulers for models with the same noise schedule, which any sampler generates with: REPLACEMENT does.
REPLACED_SCHEDULERS = (
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
REPLACEMENT = "dpm++2m"
# Kinds of models that other schedulers are made for, by the start of the class name.
OTHER_MODELS = {
    "CMStochasticIterative": "consistency models",
    "CogVideoX": "video models",
    "CosineDPMSolver": "audio models",
    "DDIMInverse": "turning images into noise",
    "DPMSolverMultistepInverse": "turning images into noise",
    "EDM": "EDM models",
    "Flow": "flow matching models, as Stable Diffusion 3 and FLUX are",
    "RePaint": "inpainting with RePaint",
    "ScoreSdeVe": "variance exploding models",
    "KarrasVe": "variance exploding models",
    "TCD": "models distilled for it, whose sampler the runtime does not have",
    "UnCLIP": "unCLIP models",
}
# Options that change the solver or its noise levels, and the values that the runtime follows. None: not set.
FOLLOWED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "algorithm_type": (None, "dpmsolver++"),
    "final_sigmas_type": (None, "zero"),
    "interpolation_type": (None, "linear"),
    "lambda_min_clipped": (None, -math.inf, "-inf"),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "solver_order": (None, 2),
    "solver_type": (None, "midpoint"),
    "use_beta_sigmas": (None, False),
    "use_exponential_sigmas": (None, False),
    "use_lu_lambdas": (None, False),
}
# Options that only models of other kinds are made for.
REFUSED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "timestep_type": (None, "discrete"),
    "use_flow_sigmas": (None, False),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
UNSTATED_SCHEDULER = "DPMSolverMultistepScheduler"  # of a configuration that names none


FLOW_SCHEDULER, FLOW_SAMPLER = "FlowMatchEulerDiscreteScheduler", "flow_euler"
# Options of it that choose other noise levels, or add noise; only models other than Stable Diffusion 3 state them.
REFUSED_FLOW_OPTIONS = (
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
    "use_beta_sigmas",
    "use_dynamic_shifting",
    "use_exponential_sigmas",
    "use_karras_sigmas",
)


class SamplerChoice(NamedTuple):
    """The sampler that stands for a scheduler.

    Attributes:
        name: of the sampler.
        replaces: the class of the scheduler, and its options that the sampler does not follow; None if it computes the
            same as the scheduler.
    """

    name: str
    replaces: str | None


def sampler_choice(config: Mapping[str, Any]) -> SamplerChoice:
    """The sampler for a supported scheduler configuration (see `scheduler_refusal`)."""
    scheduler = str(config.get("_class_name", UNSTATED_SCHEDULER))
    if scheduler == FLOW_SCHEDULER:
        return SamplerChoice(FLOW_SAMPLER, None)
    name = FOLLOWED_SCHEDULERS.get(scheduler, REPLACEMENT)
    replaces = None if scheduler in FOLLOWED_SCHEDULERS else scheduler
    options = FOLLOWED_OPTIONS if scheduler in FOLLOWED_SCHEDULERS else {}
    if others := [f"{key} {config[key]!r}" for key, values in options.items() if config.get(key) not in values]:
        replaces = f"{scheduler} with {', '.join(others)}"
    if config.get("use_karras_sigmas") and name in ("dpm++2m", "euler"):
        name = f"{name}_karras"
    return SamplerChoice(name, replaces)


def replacement_notice(model: object, sampler: str, replaces: str) -> str:
    """The warning that a sampler stands in for the scheduler of a model."""
    return (
        f"{model}: the scheduler of the model is {replaces}, which the runtime does not have. The sampler {sampler} "
        "generates instead, from the same noise schedule"
    )


def scheduler_refusal(config: Mapping[str, Any]) -> str | None:
    """Why no sampler can stand for a scheduler configuration. None if one can."""
    scheduler = str(config.get("_class_name", UNSTATED_SCHEDULER))
    known = sorted((*FOLLOWED_SCHEDULERS, *REPLACED_SCHEDULERS))
    if scheduler not in known:
        made_for = next((kind for start, kind in OTHER_MODELS.items() if scheduler.startswith(start)), None)
        return (
            f"the scheduler {scheduler!r} is not supported{f': it is made for {made_for}' if made_for else ''}; use a "
            "Stable Diffusion 1 or 2, or, if the model is one, put the scheduler of its base into scheduler/, one of "
            f"{', '.join(known)}"
        )
    for option, values in REFUSED_OPTIONS.items():
        if config.get(option) not in values:
            return (
                f"{option} {config[option]!r} of the scheduler {scheduler} is not supported; use a model that was "
                f"trained with {option} {values[1]!r}"
            )
    return None


def flow_refusal(config: Mapping[str, Any]) -> str | None:
    """Why the sampler of flow matching cannot stand for a scheduler configuration. None if it can."""
    scheduler = config.get("_class_name")
    if scheduler != FLOW_SCHEDULER:
        return (
            f"the scheduler {scheduler!r:.60} is not supported for a flow matching model, as Stable Diffusion 3 is; "
            f"put the scheduler of its base into scheduler/, a {FLOW_SCHEDULER}"
        )
    for option in REFUSED_FLOW_OPTIONS:
        if config.get(option):
            return (
                f"{option} {config[option]!r:.60} of the scheduler {scheduler} is not supported; use a model without "
                "it, as Stable Diffusion 3.5"
            )
    return None


def stated_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a diffusers scheduler, without the SAMPLER_SETTINGS that no file and no caller stated."""
    unstated = set(config.get("_use_default_values", ())) & set(SAMPLER_SETTINGS)
    return {key: value for key, value in config.items() if key not in unstated and key != "_use_default_values"}
