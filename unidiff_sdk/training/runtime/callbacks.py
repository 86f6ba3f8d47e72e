"""The data that a training run passes to its callbacks, and the result that it expects from validation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.encoders.search_model import TrainableModel
    from unidiff_sdk.training.config import TrainingConfig
    from unidiff_sdk.training.objective.encoder_model import EncoderModel

__all__ = ["ModelSnapshot", "StepReport", "ValidationFunction", "ValidationResult"]


@dataclass(frozen=True)
class StepReport:
    """Report of one optimizer step.

    Attributes:
        step: Number of the step, from 1.
        steps: Number of steps of the whole run.
        losses: Value of each term, without its weight λ.
        learning_rate: Learning rate of the step.
        seconds: Duration of the step.
        pairs: Number of pairs in the step's batch.
    """

    step: int
    steps: int
    losses: dict[str, float]
    learning_rate: float
    seconds: float
    pairs: int


@dataclass(frozen=True)
class ModelSnapshot:
    """The model as it would be saved now: averaged weights, eval mode, gradients off.

    Attributes:
        step: Steps done so far. 0: before the first step.
        model: The joint model, or the encoders alone, holding the averaged weights.
        checkpoint: The checkpoint whose parts the model shares.
        config: Settings of the run.
        score_only: Only the result is needed. Generate no samples and notify no callbacks.
    """

    step: int
    model: EncoderModel
    checkpoint: TrainableModel
    config: TrainingConfig
    score_only: bool = False


@dataclass(frozen=True)
class ValidationResult:
    """Quality of a model on pairs that are not trained on.

    Attributes:
        score: Higher is better. Early stopping and WiSE-FT maximize it.
        figures: Metrics by name. WiSE-FT of the UNet minimizes "denoising_loss".
        data: Name of the validation data.
        data_fingerprint: Identifies the validation pairs, so that a resumed run cannot continue with others.
    """

    score: float
    figures: Mapping[str, float] = field(default_factory=dict)
    data: str = ""
    data_fingerprint: str = ""


ValidationFunction = Callable[[ModelSnapshot], ValidationResult]
