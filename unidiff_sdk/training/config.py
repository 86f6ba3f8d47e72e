"""Settings of training and distillation runs. The defaults suit 200 pairs, the tiny base and two CPU cores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, get_args

from unidiff_sdk._internal.images import Fit
from unidiff_sdk._internal.json_values import is_finite_number, plain_number
from unidiff_sdk.errors import OptionError

__all__ = [
    "TERM_TITLES",
    "Component",
    "DistillationConfig",
    "Precision",
    "PriorConfig",
    "TrainingConfig",
    "with_current_names",
]

Precision = Literal["fp32", "bf16", "fp16"]

# Title of each term of the objective; the weight of term T is the field lambda_T.
TERM_TITLES = {
    "itc": "ITC: image-text contrast",
    "is": "IS: image synthesis",
    "rsc_encoder": "RSC encoder: the encoder learns the generator's ranking",
    "rsc_generator": "RSC generator: the generator learns the encoder's ranking",
    "rsc_reward": "RSC reward: the generator learns from the encoder's judgment of its own images",
    "feature_distillation": "Feature distillation: CLIP embeddings stay close to the base's",
}

# Fields that had another name in configurations recorded by earlier versions.
_RENAMED_FIELDS = {"lambda_leash": "lambda_feature_distillation"}
# Weights of terms that earlier versions had, and settings that only these terms read.
_REMOVED_WEIGHTS = ("lambda_rsc", "lambda_rsc_generated", "lambda_rsc_feature")
_REMOVED_SETTINGS = ("rsc_t_max", "rsc_samples", "rsc_teacher")


class Component(StrEnum):
    """A component of the joint model that can be tuned, adapted or locked separately. See `objective.tuning`."""

    UNET = "unet"
    TEXT = "text"
    IMAGE = "image"


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run. The objective is a weighted sum of terms; a term with weight 0 is not computed.

        L = λ_itc·ITC + λ_is·IS + λ_rsc·RSC + …

    Raises OptionError when a value is out of range or the combination cannot be trained.
    """

    # --- Duration

    steps: int = 400
    """Optimizer steps, above 0."""
    batch_size: int = 64
    """Pairs per step that pass through the UNet, above 0. Smaller if the data has fewer pairs."""
    contrastive_batch: int = 0
    """Pairs per step in the contrastive term, at least `batch_size`. 0: the same pairs as `batch_size`."""
    micro_batch: int = 0
    """Pairs in memory at a time, at least 0. The gradients stay those of the whole batch. 0: the whole batch."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass: slower, but uses a fraction of the memory."""
    shard: bool = False
    """Shard weights, gradients and optimizer state over the processes (FSDP2). Needs several processes, each of which
    takes as many pairs as the others."""
    seed: int = 0
    """Seed of all random choices, at least 0. On the CPU, the same seed gives the same weights."""
    precision: Precision = "fp32"
    """Precision of the forward passes. Weights, losses and optimizer state are always fp32."""

    # --- Optimizer: AdamW with linear warm-up, then a cosine to zero

    learning_rate: float = 2e-4
    """Peak learning rate, above 0."""
    warmup_steps: int = 20
    """Steps of linear warm-up, at least 0."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices, at least 0. Biases, norms and the temperature do not decay."""
    gradient_clip: float = 1.0
    """Maximum global gradient norm, above 0."""
    ema_decay: float = 0.99
    """Decay of the averaged weights (EMA) that are saved, in [0, 1). It ramps up during the first steps."""

    # --- Components: UNet, text side, image side

    learning_rate_unet: float = 0.0
    """Peak learning rate of the UNet, at least 0. 0: `learning_rate`."""
    learning_rate_text: float = 0.0
    """Peak learning rate of the text side, at least 0. 0: `learning_rate`."""
    learning_rate_image: float = 0.0
    """Peak learning rate of the image side, at least 0. 0: `learning_rate`."""
    lora_unet: int = 0
    """LoRA rank of the UNet, or of the transformer of Stable Diffusion 3, at least 0. 0: tune all its weights."""
    lora_text: int = 0
    """LoRA rank of the text side, at least 0. 0: tune all its weights."""
    lora_image: int = 0
    """LoRA rank of the image side, at least 0. 0: tune all its weights."""
    lock_unet: bool = False
    """Do not tune the UNet."""
    lock_text: bool = False
    """Do not tune the text side."""
    lock_image: bool = False
    """Do not tune the image side."""

    # --- ITC: image-text contrast

    lambda_itc: float = 1.0
    """Weight of ITC, at least 0."""
    hard_negatives: int = 0
    """K: each pair brings the K images of other meaning that are nearest to its caption, at least 0. A step then has
    1 / (K + 1) as many pairs of its own. 0: random batches."""
    group: tuple[str, ...] = ()
    """Columns whose equal values make two pairs positives of each other. Empty: pairs with equal captions."""

    # --- IS: image synthesis

    lambda_is: float = 1.0
    """Weight of IS, at least 0."""
    min_snr_gamma: float = 5.0
    """γ of the min-SNR weighting of timesteps, at least 0. 0: weight all timesteps equally. Stable Diffusion 3 always
    weights them equally."""
    caption_dropout: float = 0.1
    """Fraction of captions replaced by the empty caption, in [0, 1). Classifier-free guidance needs it."""

    # --- RSC: reciprocal semantic consistency

    lambda_rsc_encoder: float = 0.0
    """Weight of RSC encoder: the encoder learns how the generator ranks images for a caption. At least 0."""
    lambda_rsc_generator: float = 0.0
    """Weight of RSC generator: the generator learns how the encoder ranks images for a caption. At least 0."""
    lambda_rsc_reward: float = 0.0
    """Weight of RSC reward: the generator learns from the encoder's judgment of its own images. At least 0."""
    rsc_captions: int = 8
    """Captions per step whose candidates RSC encoder and RSC generator rank, above 0."""
    rsc_candidates: int = 4
    """Images that they rank for each caption, its own included, at least 2."""
    rsc_timesteps: int = 1
    """Timesteps, all of high noise, over which the generator's score is a mean, above 0."""
    rsc_reward_captions: int = 4
    """Captions per step that RSC reward generates an image for, above 0."""
    rsc_reward_steps: int = 6
    """Denoising steps of these images, above 0."""
    rsc_reward_last: int = 1
    """The last steps, at most `rsc_reward_steps`, through which RSC reward differentiates, above 0."""
    rsc_reward_guidance: float | None = None
    """Guidance scale of these images, at least 1 (no guidance). None: the base's own."""
    rsc_warmup_steps: int = 100
    """Steps over which the RSC weights rise linearly from 0, at least 0."""

    # --- Overfitting and forgetting

    lambda_feature_distillation: float = 0.0
    """Weight of feature distillation: keep CLIP embeddings of the pairs close to the base's. At least 0."""
    lambda_prior: float = 1.0
    """Weight of a prior pair relative to a pair of the catalog, at least 0. Used only with a prior."""
    prior_batch: int = 0
    """Prior pairs per step, at least 0. 0: `batch_size`."""
    patience: int = 0
    """Stop after this many validations in a row without improvement and keep the best weights. 0: never stop early.
    Needs validation."""
    wise_ft: bool = False
    """Interpolate between base and tuned weights (WiSE-FT) to the point that validates best. Needs validation."""

    # --- Data

    fit: Fit | None = None
    """How images become square: "crop" or "pad". None: as for the base."""
    aspect_buckets: bool = False
    """Train on rectangles instead of squares: a batch holds images of similar aspect ratio, cropped to one size."""
    flip: bool = False
    """Mirror half of the images. Do not use it for images with text or captions that say left and right."""

    # --- Checkpoints and validation

    save_every: int = 100
    """Steps between saved checkpoints, above 0."""
    keep: int = 1
    """Number of checkpoints to keep, above 0. Older ones move to `OUT.history`."""
    validate_every: int = 100
    """Steps between validations, above 0."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(
            self,
            *("steps", "batch_size", "learning_rate", "gradient_clip"),
            *("rsc_captions", "rsc_timesteps", "rsc_reward_captions", "rsc_reward_steps", "rsc_reward_last"),
            *("save_every", "keep", "validate_every"),
        )
        _require_non_negative(
            self,
            *("contrastive_batch", "micro_batch", "hard_negatives"),
            *("learning_rate_unet", "learning_rate_text", "learning_rate_image"),
            *("lora_unet", "lora_text", "lora_image"),
            *("patience", "seed", "warmup_steps", "weight_decay", "min_snr_gamma", "rsc_warmup_steps"),
            *("lambda_feature_distillation", "lambda_prior", "prior_batch"),
            *("lambda_itc", "lambda_is"),
            *("lambda_rsc_encoder", "lambda_rsc_generator", "lambda_rsc_reward"),
        )
        _require_below_one(self, "ema_decay", "caption_dropout")
        _require_choice(self, "precision", get_args(Precision))
        if self.fit is not None:
            _require_choice(self, "fit", get_args(Fit))
        self._require_trainable_batches()
        self._require_useful_negatives()
        self._require_reachable_reward()
        self._require_buckets_alone()
        self._require_shardable()
        if not (self.trains_encoder or self.trains_generator):
            raise OptionError("All term weights are 0, so there is nothing to train. Set at least one lambda above 0.")

    def _require_trainable_batches(self) -> None:
        if 0 < self.contrastive_batch < self.batch_size:
            raise OptionError(
                f"contrastive_batch is {self.contrastive_batch}. It includes the pairs of batch_size, so it must be 0 "
                f"or at least {self.batch_size}."
            )
        if self.lambda_itc and max(self.batch_size, self.contrastive_batch) < 2:
            raise OptionError(
                f"batch_size is {self.batch_size}, but the contrastive term needs at least two pairs in a batch. Raise "
                "batch_size (micro_batch=1 saves memory), set contrastive_batch, or turn the term off (lambda_itc=0)."
            )

    def _require_useful_negatives(self) -> None:
        if self.rsc_candidates < 2:
            raise OptionError(
                f"rsc_candidates is {self.rsc_candidates}, but must be at least 2: a caption's own image and another."
            )
        largest = max(self.batch_size, self.contrastive_batch)
        if self.hard_negatives >= largest:
            raise OptionError(
                f"hard_negatives is {self.hard_negatives}, but a batch of {largest} holds a pair and at most "
                f"{largest - 1} negatives."
            )
        if self.hard_negatives and not (self.lambda_itc or self.ranks or self.lambda_rsc_reward):
            raise OptionError(
                "hard_negatives has no effect: no term compares the pairs of a batch. Set lambda_itc, "
                "lambda_rsc_encoder, lambda_rsc_generator or lambda_rsc_reward above 0."
            )

    def _require_reachable_reward(self) -> None:
        if self.rsc_reward_last > self.rsc_reward_steps:
            raise OptionError(
                f"rsc_reward_last is {self.rsc_reward_last}, but an image has only {self.rsc_reward_steps} denoising "
                "steps (rsc_reward_steps). Lower the first, or raise the second."
            )
        if self.rsc_reward_guidance is not None and self.rsc_reward_guidance < 1:
            raise OptionError(
                f"rsc_reward_guidance is {self.rsc_reward_guidance}, but must be at least 1 (no guidance)."
            )
        if self.lambda_rsc_reward and self.lock_unet:
            raise OptionError("lambda_rsc_reward trains only the UNet, but lock_unet is set. Remove one of them.")
        if self.lambda_rsc_reward and max(self.batch_size, self.contrastive_batch) < 2:
            raise OptionError(
                f"batch_size is {self.batch_size}, but lambda_rsc_reward compares the captions of a batch and needs at "
                "least two. Raise batch_size (micro_batch=1 saves memory), or set contrastive_batch."
            )

    def _require_buckets_alone(self) -> None:
        if self.aspect_buckets and self.fit == "pad":
            raise OptionError('aspect_buckets crops images to rectangles, so fit cannot be "pad". Omit one of them.')
        if self.aspect_buckets and self.hard_negatives:
            raise OptionError(
                "aspect_buckets and hard_negatives exclude each other: the negatives of a pair have other aspect "
                "ratios than its image. Omit one of them."
            )

    def _require_shardable(self) -> None:
        if self.shard and self.precision == "fp16":
            raise OptionError(
                'shard and precision "fp16" exclude each other: the loss scale follows from all gradients, of which a '
                'process has a share. Use "bf16" or "fp32".'
            )
        if self.shard and self.aspect_buckets:
            raise OptionError(
                "shard and aspect_buckets exclude each other: the batches of buckets differ in size, but processes "
                "that share weights need equally many pairs. Omit one of them."
            )

    def without_effect(self, *, prior: bool, validation: bool) -> str | None:
        """The first setting that differs from its default and that no part of the run reads, with the reason.

        Args:
            prior: whether prior pairs are given.
            validation: whether the run is validated.
        """
        texts = (self.embeds_texts or self.lambda_rsc_reward, "no term uses CLIP embeddings")
        ranks = (self.ranks, "lambda_rsc_encoder and lambda_rsc_generator are 0")
        needs = {
            "min_snr_gamma": (self.lambda_is, "lambda_is is 0"),
            "caption_dropout": (self.lambda_is, "lambda_is is 0"),
            "group": texts,
            "contrastive_batch": texts,
            "rsc_warmup_steps": (self.ranks or self.lambda_rsc_reward, "all RSC weights are 0"),
            "rsc_captions": ranks,
            "rsc_candidates": ranks,
            "rsc_timesteps": ranks,
            **dict.fromkeys(
                ("rsc_reward_captions", "rsc_reward_steps", "rsc_reward_last", "rsc_reward_guidance"),
                (self.lambda_rsc_reward, "lambda_rsc_reward is 0"),
            ),
            "lambda_prior": (prior, "there is no prior"),
            "aspect_buckets": (self.lambda_is or self.ranks, "no term denoises images"),
            "prior_batch": (prior, "there is no prior"),
            "validate_every": (validation, "there is no validation"),
        }
        for component in Component:
            for name in (f"lora_{component}", f"learning_rate_{component}"):
                needs[name] = (component not in self.locked, "the component is locked, or no term trains it")
        for field in fields(self):
            is_read, reason = needs.get(field.name, (True, ""))
            if not is_read and getattr(self, field.name) != field.default:
                return f"{field.name} has no effect: {reason}."
        return None

    @classmethod
    def from_dict(cls, recorded: Mapping[str, Any]) -> TrainingConfig:
        """Build a configuration from a JSON object, such as "config" in a checkpoint's unidiff.json.

        Names of earlier versions are accepted. Raises OptionError for an unknown name or a value out of range.
        """
        current = with_current_names(recorded)
        known = [field.name for field in fields(cls)]
        if removed := current.keys() & set(_REMOVED_WEIGHTS):
            raise OptionError(f"{min(removed)} is the weight of a term that this version does not have. Omit it.")
        if unknown := current.keys() - set(known):
            raise OptionError(f"Unknown setting {min(unknown)!r}. Settings: {', '.join(known)}.")
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in current.items()
        }
        return cls(**values)

    @property
    def locked(self) -> set[Component]:
        """The components that keep their weights: locked by a setting, or not reached by any term."""
        locked = {component for component in Component if getattr(self, f"lock_{component}")}
        if not self.trains_generator:
            locked.add(Component.UNET)
        if not self.trains_text:
            locked.add(Component.TEXT)
        if not self.trains_encoder:
            locked.add(Component.IMAGE)
        return locked

    def lora_rank(self, component: Component) -> int:
        """LoRA rank of a component. 0 if it is locked or all its weights are tuned."""
        return 0 if component in self.locked else int(getattr(self, f"lora_{component}"))

    def peak_learning_rate(self, component: Component) -> float:
        """Peak learning rate of a component: its own, or `learning_rate`."""
        return float(getattr(self, f"learning_rate_{component}")) or self.learning_rate

    @property
    def trains_generator(self) -> bool:
        """Whether any term trains the UNet."""
        return self.trains_conditioning or self.lambda_rsc_reward > 0

    @property
    def trains_conditioning(self) -> bool:
        """Whether any term trains the UNet together with the text encoder that conditions it."""
        return self.lambda_is > 0 or self.lambda_rsc_generator > 0

    @property
    def trains_text(self) -> bool:
        """Whether any term trains the text side."""
        return self.trains_encoder or self.trains_conditioning or self.lambda_feature_distillation > 0

    @property
    def trains_encoder(self) -> bool:
        """Whether any term needs CLIP embeddings of images with gradients."""
        return any((self.lambda_itc, self.lambda_rsc_encoder))

    @property
    def ranks(self) -> bool:
        """Whether any term compares how encoder and generator rank images for a caption."""
        return any((self.lambda_rsc_encoder, self.lambda_rsc_generator))

    @property
    def embeds_images(self) -> bool:
        """Whether any term needs CLIP embeddings of images."""
        return self.trains_encoder or self.ranks

    @property
    def embeds_texts(self) -> bool:
        """Whether any term needs CLIP embeddings of captions."""
        return self.embeds_images or self.lambda_feature_distillation > 0


@dataclass(frozen=True)
class PriorConfig:
    """Prior pairs: examples of what the base already does well, trained on together with the catalog.

    Raises OptionError when `pairs` is below 1.
    """

    folder: Path
    """A catalog folder."""
    prompts: tuple[str, ...] = ()
    """Prompts that the base generates images for, in turn, before training. Empty: use the folder as it is."""
    pairs: int = 200
    """Number of pairs that the folder holds after generation, at least 1. Used only with `prompts`."""

    def __post_init__(self) -> None:
        _require_types(self)
        if self.pairs < 1:
            raise OptionError(f"The prior has pairs={self.pairs}, but it needs at least 1.")
        if self.pairs != PriorConfig.pairs and not self.prompts:
            raise OptionError(
                f"The prior has pairs={self.pairs}, which has no effect without prompts. Give prompts to generate "
                "images for, or omit it."
            )


@dataclass(frozen=True)
class DistillationConfig:
    """Settings of a distillation run: a teacher of many guided steps, a student of few steps without guidance.

    Raises OptionError when a value is out of range.
    """

    # --- Student and teacher

    student_steps: int = 4
    """Denoising steps of the student, above 0."""
    teacher_steps: int = 12
    """Denoising steps of the teacher, a multiple of `student_steps` and above it."""
    guidance_scale: float | None = None
    """Guidance scale of the teacher, at least 1 (no guidance). None: the checkpoint's own."""
    trajectories: int = 2048
    """Teacher trajectories to record, above 0. Each gives one training pair per student step."""

    # --- Duration

    steps: int = 1500
    """Optimizer steps, above 0."""
    batch_size: int = 32
    """Latent pairs per step, above 0."""
    seed: int = 0
    """Seed of all random choices, at least 0."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward passes. Weights, losses and optimizer state are always fp32."""

    # --- Optimizer: AdamW with linear warm-up, then a cosine to zero

    learning_rate: float = 5e-4
    """Peak learning rate, above 0."""
    warmup_steps: int = 50
    """Steps of linear warm-up, at least 0."""
    gradient_clip: float = 1.0
    """Maximum global gradient norm, above 0."""
    ema_decay: float = 0.99
    """Decay of the averaged weights (EMA) that are saved, in [0, 1)."""

    def __post_init__(self) -> None:
        _require_types(self)
        _require_positive(
            self, *("student_steps", "trajectories", "steps", "batch_size", "learning_rate", "gradient_clip")
        )
        _require_non_negative(self, "seed", "warmup_steps")
        _require_below_one(self, "ema_decay")
        _require_choice(self, "precision", ("fp32", "bf16"))
        if self.guidance_scale is not None and not self.guidance_scale >= 1:
            raise OptionError(f"guidance_scale is {self.guidance_scale}, but must be at least 1 (no guidance).")
        if not self.student_steps < self.teacher_steps or self.teacher_steps % self.student_steps:
            raise OptionError(
                f"teacher_steps is {self.teacher_steps}, but must be a multiple of student_steps "
                f"({self.student_steps}) and above it, for example {3 * self.student_steps}."
            )


def with_current_names(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded training configuration under the field names of this version, without removed terms that were off."""
    return {
        _RENAMED_FIELDS.get(name, name): value
        for name, value in recorded.items()
        if name not in _REMOVED_SETTINGS and (value or name not in _REMOVED_WEIGHTS)
    }


def _require_types(config: Any) -> None:
    """Check the type of every setting by that of its default, and turn numbers of numpy into those of Python."""
    for field in fields(config):
        value = plain_number(getattr(config, field.name))
        match field.default:
            case bool():
                fits, wanted = isinstance(value, bool), "True or False"
            case int():
                fits, wanted = isinstance(value, int) and not isinstance(value, bool), "an integer"
            case float():
                fits, wanted = is_finite_number(value), "a finite number"
            case tuple():
                names = value if isinstance(value, tuple | list) else ()
                fits = isinstance(value, tuple | list) and all(isinstance(name, str) for name in names)
                value, wanted = tuple(names) if fits else value, "a sequence of texts"
            case None if field.name in ("guidance_scale", "rsc_reward_guidance"):
                fits, wanted = value is None or is_finite_number(value), "a finite number, or None"
            case _:
                continue
        if not fits:
            raise OptionError(f"{field.name} is {value!r:.60}, but must be {wanted}.")
        object.__setattr__(config, field.name, value)


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise OptionError(f"{name} is {getattr(config, name)}, but must be above 0.")


def _require_non_negative(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= 0:
            raise OptionError(f"{name} is {getattr(config, name)}, but must be at least 0.")


def _require_below_one(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise OptionError(f"{name} is {getattr(config, name)}, but must be in [0, 1).")


def _require_choice(config: object, name: str, choices: Iterable[str]) -> None:
    if getattr(config, name) not in choices:
        raise OptionError(f"{name} is {getattr(config, name)!r}, but must be one of {', '.join(choices)}.")
