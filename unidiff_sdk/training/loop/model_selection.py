"""Model selection: when to validate, which weights were best, when to stop, and which weights the run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff_sdk.errors import CheckpointError, OptionError
from unidiff_sdk.training.checkpoints.encoders.search_model import TrainableModel
from unidiff_sdk.training.runtime.callbacks import ModelSnapshot, ValidationFunction, ValidationResult

from .learner import Learner
from .wise_ft import wise_ft

__all__ = ["ModelSelection"]

BEST = "best.safetensors"
# Attributes that are saved and restored as JSON.
STATE = (
    "validated_step",
    "data_fingerprint",
    "best_step",
    "best_score",
    "validations_since_best",
    "latest",
)


class ModelSelection:
    """Validates the averaged weights before the first step, every `validate_every` steps and after the last step.

    With patience p, the run stops after p validations in a row without improvement and ends with the weights of the
    best one (early stopping, Prechelt 1998). With WiSE-FT, it ends with an interpolation between the base's weights and
    those, see `wise_ft`. With several processes, the main one validates and the others follow its decision.

    Create it while the learner holds the base's weights.
    """

    def __init__(self, on_validate: ValidationFunction | None, learner: Learner, checkpoint: TrainableModel) -> None:
        config = learner.config
        self.on_validate = on_validate
        self.learner = learner
        self.checkpoint = checkpoint
        self.validated_step = -1  # step of the last validation
        self.data_fingerprint = ""  # identifies the validation pairs, once there was a validation
        self.best_step, self.best_score = -1, 0.0
        self.validations_since_best = 0
        self.latest: dict[str, Any] = {}  # step, data, score and figures of the last validation
        self.best: dict[str, Tensor] = {}  # averaged weights, on the CPU
        self.base: dict[str, Tensor] = {}
        if config.wise_ft:
            with learner.whole():
                self.base = {name: weight.clone() for name, weight in learner.ema.weights.items()}

    def validate_if_due(self, step: int) -> None:
        """Validate after `step` steps if it is due and has not been done."""
        config = self.learner.config
        due = step % config.validate_every == 0 or step == config.steps
        if self.on_validate is None or not due or step <= self.validated_step:
            return
        self.validated_step = step
        with self.learner.whole():
            if self.learner.processes.is_main:
                self._keep_if_best(step, self._validate(step))

    @property
    def should_stop(self) -> bool:
        """Whether to stop early. All processes must ask together."""
        patience, processes = self.learner.config.patience, self.learner.processes
        if not patience:
            return False
        return processes.any(self.validations_since_best >= patience)

    def choose_weights(self, step: int) -> dict[str, Any]:
        """Leave the weights that the run ends with in the averaged weights. Returns how they were chosen.

        Call it within `Learner.whole`.
        """
        chosen: dict[str, Any] = {}
        learner = self.learner
        if not learner.processes.is_main:
            return chosen
        if learner.config.patience:
            chosen["early_stopping"] = {"stopped_at": step, "step": self.best_step, "score": self.best_score}
            for name, weight in learner.ema.weights.items():
                weight.copy_(self.best[name])
        if learner.config.wise_ft:
            chosen["wise_ft"] = wise_ft(learner, self.base, lambda: self._validate(step, score_only=True))
        if chosen:  # validate the chosen weights
            chosen["score"] = self._validate(step).score
        return chosen

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the best weights into `folder`. Returns the part of the state that JSON can hold."""
        if self.best:
            save_file(self.best, folder / BEST)
        return {name: getattr(self, name) for name in STATE}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Restore a state that `save` wrote. Raises CheckpointError if it cannot be read."""
        for name in STATE:
            now, recorded = getattr(self, name), state.get(name, getattr(self, name))
            if not isinstance(recorded, (int, float) if isinstance(now, float) else type(now)):
                raise CheckpointError(
                    f"Cannot resume from {folder}: {name} is {recorded!r:.60}. Remove the folder to start again."
                )
            setattr(self, name, recorded)
        if self.learner.config.patience and self.best_step >= 0 and self.learner.processes.is_main:
            try:
                self.best = load_file(folder / BEST)
            except Exception as error:  # safetensors raises any error of its parser
                raise CheckpointError(f"Cannot resume from {folder}: {error!r}. Remove it to start again.") from error

    def _validate(self, step: int, *, score_only: bool = False) -> ValidationResult:
        assert self.on_validate is not None
        learner = self.learner
        with learner.averaged_for_use():
            result = self.on_validate(ModelSnapshot(step, learner.model, self.checkpoint, learner.config, score_only))
        chooses = learner.config.patience or learner.config.wise_ft
        if chooses and self.data_fingerprint not in ("", result.data_fingerprint):
            raise OptionError(
                "The validation pairs differ from those of earlier validations of this run, whose scores choose the "
                "weights. Resume with the --val that the run was started with."
            )
        self.data_fingerprint = result.data_fingerprint
        if not score_only:
            figures = dict(result.figures)
            self.latest = {"step": step, "data": result.data, "score": result.score, "figures": figures}
        return result

    def _keep_if_best(self, step: int, result: ValidationResult) -> None:
        if self.best_step >= 0 and not result.score > self.best_score:
            self.validations_since_best += 1
            return
        self.best_step, self.best_score, self.validations_since_best = step, result.score, 0
        if self.learner.config.patience:
            weights = self.learner.ema.weights.items()
            self.best = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights}
