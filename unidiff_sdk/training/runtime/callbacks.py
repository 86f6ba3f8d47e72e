"""What a run tells those who look on, and what it asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
    from unidiff_sdk.training.config import TrainingConfig
    from unidiff_sdk.training.objective.joint_model import JointModel

__all__ = ["Moment", "StepReport", "Validate", "Validated"]


@dataclass(frozen=True)
class StepReport:
    """What one step did. losses: each term's plain value, without its λ."""

    step: int  # from 1
    steps: int
    losses: dict[str, float]
    learning_rate: float
    seconds: float  # of this step
    pairs: int


@dataclass(frozen=True)
class Moment:
    """The model as it would be saved now: averaged weights, eval mode, no gradients. step 0: before the first step.

    quick: the answer alone is wanted, one of many: there is nothing to draw, and nobody to tell.
    """

    step: int
    model: JointModel
    checkpoint: Checkpoint
    config: TrainingConfig
    quick: bool = False


@dataclass(frozen=True)
class Validated:
    """How good the model is on pairs that it does not learn from.

    score: what early stopping and WiSE-FT maximize, higher is better. figures: for a UNet's WiSE-FT, "denoising_loss".
    measured_on: a fingerprint of those pairs, where a run that is resumed must not go on with others.
    """

    score: float
    figures: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""


Validate = Callable[[Moment], Validated]
