"""Every number that decides a training run. The defaults suit two hundred pairs, the tiny base and two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal, get_args

from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import OptionError

__all__ = ["DistillationConfig", "Part", "Precision", "Prior", "Teacher", "TrainingConfig"]

Precision = Literal["fp32", "bf16", "fp16"]
Teacher = Literal["tuned", "ema", "frozen"]


class Part(StrEnum):
    """What can be tuned apart: see `tuning`."""

    UNET = "unet"
    TEXT = "text"
    IMAGE = "image"


@dataclass(frozen=True)
class TrainingConfig:
    """L = λ_itc·ITC + λ_is·IS + λ_rsc·RSC, and how it is descended. A term whose λ is zero is not computed at all."""

    # how long
    steps: int = 400
    batch_size: int = 64  # pairs a step that go through the UNet; fewer where the data has fewer
    contrastive_batch: int = 0  # pairs a step that are contrasted; 0: those of batch_size, else at least as many
    micro_batch: int = 0  # pairs in memory at a time, with the same gradients; 0: all of a step
    checkpoint_activations: bool = False  # compute them again on the way back: slower, in a fraction of the memory
    seed: int = 0
    precision: Precision = "fp32"  # of the models' passes; weights, losses and the optimizer are always fp32

    # how fast: AdamW, linear warm-up, then a cosine down to zero
    learning_rate: float = 2e-4
    warmup_steps: int = 20
    weight_decay: float = 0.01  # of matrices only, not of biases, norms or the temperature
    gradient_clip: float = 1.0  # of the global norm
    ema_decay: float = 0.99  # of the weights that are saved; ramped up from zero over the first steps

    # what is tuned; a learning rate of 0 is that above, a rank of 0 tunes the part in full, else by LoRA
    learning_rate_unet: float = 0.0
    learning_rate_text: float = 0.0
    learning_rate_image: float = 0.0
    lora_unet: int = 0
    lora_text: int = 0
    lora_image: int = 0
    lock_unet: bool = False
    lock_text: bool = False
    lock_image: bool = False

    # image-text contrast
    lambda_itc: float = 1.0
    group: tuple[str, ...] = ()  # columns that make two pairs mean the same; default: equal captions

    # image synthesis
    lambda_is: float = 1.0
    min_snr_gamma: float = 5.0  # 0 weighs all timesteps alike
    caption_dropout: float = 0.1  # share of captions left out, for classifier-free guidance

    # reciprocal semantic consistency
    lambda_rsc: float = 0.1  # the generator learns from the encoder, through pixels
    lambda_rsc_generated: float = 0.0  # the encoder learns from the generator's pictures
    lambda_rsc_feature: float = 0.0  # both learn from each other's features, without decoding
    rsc_t_max: int = 400  # the gate: noisier estimates than this timestep's are left out
    rsc_samples: int = 16  # at most so many estimates are decoded a step: they are what RSC costs
    rsc_warmup_steps: int = 100
    rsc_teacher: Teacher = "tuned"  # f̄: the tuned encoder under stopped gradients, its EMA, or the base's encoder

    # against the dangers of small data; the last two need pairs to validate on
    lambda_leash: float = 0.0  # CLIP's embeddings of the pairs stay near the base's
    lambda_prior: float = 1.0  # what a pair of the base's own world counts against one of the catalog, if there are any
    prior_batch: int = 0  # such pairs a step; 0: as many as batch_size
    patience: int = 0  # looks in a row without a better one that end the run, with the best one's weights; 0: never
    wise_ft: bool = False  # end between the base's weights and the tuned ones, where the looks are best

    # data
    fit: Fit | None = None  # how pictures become squares; None: as the base's were
    flip: bool = False  # mirror half of the pictures; wrong where they bear text, or captions say left and right

    # housekeeping
    save_every: int = 100  # steps between checkpoints; the last good one survives whatever stops the run
    keep: int = 1  # checkpoints that are kept; older ones than the last lie in OUT.history
    validate_every: int = 100  # steps between validations, where there is something to validate on

    def __post_init__(self) -> None:
        positive = (
            *("steps", "batch_size", "learning_rate", "gradient_clip", "rsc_samples"),
            *("save_every", "keep", "validate_every"),
        )
        non_negative = (
            *("contrastive_batch", "micro_batch"),
            *("learning_rate_unet", "learning_rate_text", "learning_rate_image"),
            *("lora_unet", "lora_text", "lora_image"),
            *("patience", "seed", "warmup_steps", "weight_decay", "min_snr_gamma", "rsc_t_max", "rsc_warmup_steps"),
            *("lambda_leash", "lambda_prior", "prior_batch"),
            *("lambda_itc", "lambda_is", "lambda_rsc", "lambda_rsc_generated", "lambda_rsc_feature"),
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be above zero, not {getattr(self, name)}")
        for name in non_negative:
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must not be negative, but is {getattr(self, name)}")
        for name in ("ema_decay", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        for name, choices in {"precision": get_args(Precision), "rsc_teacher": get_args(Teacher)}.items():
            if getattr(self, name) not in choices:
                raise OptionError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.fit not in (None, *get_args(Fit)):
            raise OptionError(f"fit must be one of {', '.join(get_args(Fit))}, not {self.fit!r}")
        if 0 < self.contrastive_batch < self.batch_size:
            raise OptionError(
                f"contrastive_batch holds the pairs of batch_size, so it must be 0 or at least {self.batch_size}, "
                f"not {self.contrastive_batch}"
            )
        if self.lambda_itc and max(self.batch_size, self.contrastive_batch) < 2:
            raise OptionError(
                "a contrast needs at least two pairs in a batch: give a batch_size (in micro-batches of 1, if memory "
                "is short) or a contrastive_batch, or switch it off (lambda_itc 0)"
            )
        if not (self.trains_encoder or self.trains_generator):
            raise OptionError("every λ is zero: there is nothing to train")

    @property
    def locked(self) -> set[Part]:
        """The parts that stay as they are: on request, or because no term reaches them."""
        locked = {part for part in Part if getattr(self, f"lock_{part}")}
        unreached = {Part.UNET: not self.trains_generator, Part.IMAGE: not self.trains_encoder}
        return locked | {part for part, alone in unreached.items() if alone}

    def lora_rank(self, part: Part) -> int:
        """0 where the part is tuned in full or not at all."""
        return 0 if part in self.locked else int(getattr(self, f"lora_{part}"))

    def peak_learning_rate(self, part: Part) -> float:
        """The part's own learning rate, else that of all."""
        return float(getattr(self, f"learning_rate_{part}")) or self.learning_rate

    @property
    def trains_generator(self) -> bool:
        """Whether the UNet is run at all."""
        return any((self.lambda_is, self.lambda_rsc, self.lambda_rsc_generated, self.lambda_rsc_feature))

    @property
    def trains_encoder(self) -> bool:
        """Whether pictures go through CLIP for their own sake."""
        return any((self.lambda_itc, self.lambda_rsc_generated, self.lambda_rsc_feature))

    @property
    def embeds_texts(self) -> bool:
        """Whether captions go through CLIP for their own sake."""
        return self.trains_encoder or self.lambda_leash > 0

    @property
    def embeds_generator(self) -> bool:
        """Whether terms between samples need what the UNet makes of them."""
        return any((self.lambda_rsc_generated, self.lambda_rsc_feature))

    @property
    def decodes(self) -> bool:
        """Whether denoising estimates are decoded to pixels."""
        return any((self.lambda_rsc, self.lambda_rsc_generated))


@dataclass(frozen=True)
class Prior:
    """Pairs of the base's own world: a catalog folder. prompts: what the base draws into it, in turn, before it is
    tuned, until the folder holds so many `pairs`."""

    folder: Path
    prompts: tuple[str, ...] = ()
    pairs: int = 200

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise OptionError(f"a prior needs at least one pair, not {self.pairs}")


@dataclass(frozen=True)
class DistillationConfig:
    """Every number that decides a distillation. The defaults suit the tiny model and two CPU cores."""

    # what is learned
    student_steps: int = 4
    teacher_steps: int = 12  # a multiple of the student's
    guidance_scale: float | None = None  # of the teacher; None: the checkpoint's own
    trajectories: int = 2048  # of the teacher, recorded once; each gives a pair for every step of the student

    # how long
    steps: int = 1500
    batch_size: int = 32  # pairs a step
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"

    # how fast: AdamW, linear warm-up, then a cosine down to zero
    learning_rate: float = 5e-4
    warmup_steps: int = 50
    gradient_clip: float = 1.0
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        for name in ("student_steps", "trajectories", "steps", "batch_size", "learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise OptionError(f"{name} must be above zero, not {getattr(self, name)}")
        for name in ("seed", "warmup_steps"):
            if not getattr(self, name) >= 0:
                raise OptionError(f"{name} must not be negative, but is {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise OptionError(f"ema_decay must lie in [0, 1), not {self.ema_decay}")
        if self.guidance_scale is not None and not self.guidance_scale >= 1:
            raise OptionError(f"guidance_scale must be at least 1, which is none, not {self.guidance_scale}")
        if self.precision not in ("fp32", "bf16"):
            raise OptionError(f"precision must be fp32 or bf16, not {self.precision!r}")
        if not self.student_steps < self.teacher_steps or self.teacher_steps % self.student_steps:
            raise OptionError(
                f"{self.teacher_steps} steps of the teacher cannot be divided among {self.student_steps} of the "
                f"student; give a multiple, e.g. {3 * self.student_steps}"
            )
