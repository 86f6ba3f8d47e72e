"""How images are generated and which of them are selected: one frozen set of options, validated once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from unidiff_sdk._internal.images import HasImage, ImageSource
from unidiff_sdk._internal.json_values import checked_text, plain_number, whole_number
from unidiff_sdk.errors import OptionError

__all__ = [
    "LONG_PROMPTS",
    "MAX_SEED",
    "GenerationOptions",
    "LoadsImage",
    "ResolvedOptions",
    "Safety",
    "checked_prompts",
    "default_strength",
]

LONG_PROMPTS = ("truncate", "chunk")
MAX_GUIDANCE_SCALE = 50.0
MAX_LORA_WEIGHT = 10.0
MAX_SEED = 2**63 - 1  # the largest integer in a payload
MAX_CANDIDATES = 100_000  # of a prompt in one call, which holds all of them in memory
BUDGET_FACTOR = 4
_NUMBERS = (
    *("n", "seed", "steps", "guidance_scale", "guidance_rescale", "width", "height", "strength"),
    *("best_of", "min_score", "max_similarity", "budget"),
)

Safety = Callable[[Image.Image], Image.Image | None]
"""Receives a generated image; returns it, an image to use instead, or None to reject it."""


@runtime_checkable
class LoadsImage(Protocol):
    """Anything that loads an image on request, such as `Hit`."""

    def load_image(self) -> Image.Image: ...


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How images are generated for each prompt, and which of them are selected.

    Attributes:
        negative_prompt: what guidance leads away from; None is the same as "".
        n: number of images for each prompt, at least 1.
        seed: 0 to 2**63 - 1. The k-th image of a prompt uses `seed + k`. None: a random seed.
        steps: number of denoising steps, at least 1. None: the bundle's default.
        guidance_scale: 0 to 50 (Ho & Salimans 2022, arXiv:2207.12598). At 1 or below, guidance is off,
            which halves the work. None: the bundle's default.
        guidance_rescale: 0 to 1; removes the contrast that a high guidance_scale adds (Lin et al. 2023,
            arXiv:2305.08891, which recommends 0.7).
        sampler: a name in `unidiff_sdk.generation.samplers.SAMPLERS`, or for Stable Diffusion 3 in `FLOW_SAMPLERS`.
            None: the bundle's default.
        width, height: in pixels, multiples of the model's smallest block. None: the size that the model was trained at.
        lora: switchable LoRAs of the bundle (`Bundle.loras`): a name, several names, or a weight for each name, which
            is not 0 and at most ±10. Without a weight, that of the export. None: none.
        long_prompts: for prompts longer than `Bundle.prompt_tokens`: "truncate" ignores the rest with a warning,
            "chunk" encodes the prompt in windows.
        like: an image to start from, cropped or padded to the size as the training images were.
        strength: above 0, up to 1, with `like`: how much of the image may change. The generation runs this share of
            the steps. None: 0.7, or 1 with a mask.
        mask: with `like`: an image that is bright where to repaint. All other pixels stay as they are, also
            where the mask is transparent.
        best_of: number of candidates for each prompt. The n best are selected. None: n.
        min_score: reject candidates whose cosine with the prompt is lower, -1 to 1.
        max_similarity: reject candidates whose cosine with a catalog item is higher, -1 to 1.
        budget: the largest number of candidates for each prompt, including those that replace rejected ones. None:
            four times the first round.
        safety: called with each candidate; returns it, an image to use instead, or None to reject it.

    Raises:
        OptionError: a value is out of range or of another type. The message names the accepted values.
    """

    negative_prompt: str | None = ""
    n: int = 1
    seed: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    sampler: str | None = None
    width: int | None = None
    height: int | None = None
    lora: str | Iterable[str] | Mapping[str, float | None] | None = None
    long_prompts: str = "truncate"
    like: ImageSource | HasImage | LoadsImage | None = field(default=None, repr=False)
    strength: float | None = None
    mask: ImageSource | HasImage | LoadsImage | None = field(default=None, repr=False)
    best_of: int | None = None
    min_score: float | None = None
    max_similarity: float | None = None
    budget: int | None = None
    safety: Safety | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self._set(**{name: plain_number(getattr(self, name)) for name in _NUMBERS})
        self._set(negative_prompt=_text("negative_prompt", self.negative_prompt))
        self._check_generation()
        self._check_source()
        self._check_selection()
        if self.max_candidates > MAX_CANDIDATES:
            raise OptionError(
                f"n, best_of and budget ask for up to {self.max_candidates:,} candidates of a prompt; give at most "
                f"{MAX_CANDIDATES:,}, or call several times"
            )
        if self.seed is not None and self.seed + self.max_candidates - 1 > MAX_SEED:
            raise OptionError(
                f"seed is {self.seed}, and {self.max_candidates} images may use the seeds from it on; give at most "
                f"{MAX_SEED - self.max_candidates + 1}"
            )

    @property
    def first_round(self) -> int:
        """Number of candidates that are generated for each prompt at first."""
        return self.n if self.best_of is None else self.best_of

    @property
    def max_candidates(self) -> int:
        """The most candidates that are generated for one prompt."""
        if self.min_score is None and self.max_similarity is None and self.safety is None:
            return self.first_round  # none can be rejected
        return BUDGET_FACTOR * self.first_round if self.budget is None else self.budget

    @property
    def selects(self) -> bool:
        """Whether the options ask for a selection, which needs an encoder and a catalog."""
        return any(
            value is not None for value in (self.best_of, self.min_score, self.max_similarity, self.budget, self.safety)
        )

    def _check_generation(self) -> None:
        self._set(n=whole_number("n", self.n, at_least=1))
        if self.seed is not None:
            self._set(seed=whole_number("seed", self.seed, at_least=0))
        if self.steps is not None:
            self._set(steps=whole_number("steps", self.steps, at_least=1))
        if self.guidance_scale is not None:
            self._set(guidance_scale=_number("guidance_scale", self.guidance_scale, at_most=MAX_GUIDANCE_SCALE))
        self._set(guidance_rescale=_number("guidance_rescale", self.guidance_rescale, at_most=1.0))
        if self.sampler is not None and not isinstance(self.sampler, str):
            raise OptionError(f"sampler is {self.sampler!r:.60}; give the name of a sampler, such as 'ddim'")
        self._set(lora=_checked_loras(self.lora))
        if self.long_prompts not in LONG_PROMPTS:
            raise OptionError(f"long_prompts is {self.long_prompts!r}; use one of {', '.join(LONG_PROMPTS)}")

    def _check_source(self) -> None:
        if self.like is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise OptionError(f"{name} applies to an image to start from; give that image as like=")
        strength: Any = self.strength
        if strength is not None and not (_is_number(strength) and 0 < strength <= 1):
            raise OptionError(f"strength is {strength!r}; give a number above 0 (no change) and up to 1")

    def _check_selection(self) -> None:
        for name, least in (("best_of", self.n), ("budget", self.first_round)):
            value = getattr(self, name)
            if value is not None:
                self._set(**{name: whole_number(name, value, at_least=least)})
        for name in ("min_score", "max_similarity"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and -1 <= value <= 1):
                raise OptionError(f"{name} is {value!r}; it is a cosine: give a number from -1 to 1")
        if self.budget is not None and self.max_candidates == self.first_round < self.budget:
            raise OptionError(
                f"budget is {self.budget}, and no candidate can be rejected; give min_score, max_similarity or safety, "
                "or omit it"
            )
        if self.safety is not None and not callable(self.safety):
            raise OptionError(f"safety is {self.safety!r:.60}; give a function of an image")

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class ResolvedOptions(GenerationOptions):
    """Validated options with a bundle's defaults filled in: see `Generator.resolve`."""

    negative_prompt: str
    seed: int
    steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int
    lora: tuple[tuple[str, float], ...] = ()  # type: ignore[assignment]  # names with weights

    def __post_init__(self) -> None:
        """Nothing to check: they come from options that are valid."""

    @property
    def guided(self) -> bool:
        """Whether each image takes a second prediction, without the prompt."""
        return self.guidance_scale > 1

    def round(self, offset: int, count: int) -> ResolvedOptions:
        """The options that generate `count` candidates from the seed `seed + offset` on, without a selection."""
        unselected = dict.fromkeys(("best_of", "min_score", "max_similarity", "budget", "safety"))
        return replace(self, n=count, seed=self.seed + offset, **unselected)  # type: ignore[arg-type]


def default_strength(masked: bool) -> float:
    """The strength where none is given. With a mask, the image is forgotten where it is repainted."""
    return 1.0 if masked else 0.7


def checked_prompts(prompt: Any) -> list[str]:
    """One prompt, or several, as a list. Raises OptionError for anything but valid text."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Iterable) else [prompt]
    for each in prompts:
        if not isinstance(each, str):
            raise OptionError(f"prompt is {each!r:.60}; give a text, or a list of texts")
    return [checked_text(each) for each in prompts]


def _checked_loras(lora: Any) -> dict[str, float | None] | None:
    """Names of LoRAs with their weights. Raises OptionError for anything but texts and numbers."""
    if lora is None:
        return None
    if isinstance(lora, str) or not isinstance(lora, Iterable):
        lora = [lora]
    given = lora.items() if isinstance(lora, Mapping) else [(name, None) for name in lora]
    weights: dict[str, Any] = {}
    for name, weight in given:
        if not isinstance(name, str):
            raise OptionError(f"lora names {name!r:.60}; give the name of a LoRA, or names with their weights")
        weight = weights[name] = plain_number(weight)
        if weight is not None and not (_is_number(weight) and 0 < abs(weight) <= MAX_LORA_WEIGHT):
            raise OptionError(
                f"lora gives {name!r:.60} the weight {weight!r:.60}; give a number that is not 0 and at most "
                f"±{MAX_LORA_WEIGHT:g}, or leave the LoRA out"
            )
    return {name: None if weight is None else float(weight) for name, weight in weights.items()} or None


def _text(name: str, text: Any) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise OptionError(f"{name} is {text!r:.60}; give a text")
    return checked_text(text)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(name: str, value: Any, *, at_most: float) -> float:
    if not _is_number(value) or not 0 <= value <= at_most:
        raise OptionError(f"{name} is {value!r}; give a number from 0 to {at_most:g}")
    return float(value)
