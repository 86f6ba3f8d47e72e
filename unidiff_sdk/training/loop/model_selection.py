"""Looks at a model on its way: when one is due, which was best, when to stop, and which weights the run ends with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unidiff_sdk.errors import CheckpointError, OptionError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.runtime.callbacks import Moment, Validate, Validated

from .learner import Learner
from .wise_ft import wise_ft

__all__ = ["Looks"]

BEST = "best.safetensors"
KEPT = ("looked", "measured_on", "best_step", "best_score", "since_best")  # of the state, by JSON


class Looks:
    """What `on_validate` says of the averaged weights, before the first step, every so many and after the last.

    With patience p, the run is over once p looks in a row were no better than the best, and ends with the best look's
    weights (early stopping, Prechelt 1998). With WiSE-FT, it ends somewhere on the line from the base's weights to
    those, see `wiseft`. In several processes, the main one looks and the others do as it says.

    Made while the learner holds the base's weights.
    """

    def __init__(self, on_validate: Validate | None, learner: Learner, checkpoint: Checkpoint) -> None:
        config = learner.config
        self.on_validate = on_validate
        self.learner = learner
        self.checkpoint = checkpoint
        self.looked = -1  # the step of the last look
        self.measured_on = ""  # fingerprint of the pairs, once there was a look
        self.best_step, self.best_score = -1, 0.0
        self.since_best = 0  # looks
        self.best: dict[str, Tensor] = {}  # averaged weights, on the CPU
        self.base = {name: t.clone() for name, t in learner.ema.weights.items()} if config.wise_ft else {}

    def look_if_due(self, step: int) -> None:
        """Look after `step` steps, if it is time and has not been done."""
        config = self.learner.config
        due = step % config.validate_every == 0 or step == config.steps
        if self.on_validate is None or not due or step <= self.looked:
            return
        self.looked = step
        if self.learner.processes.is_main:
            self._compare(step, self._look(step))

    @property
    def are_over(self) -> bool:
        """Whether to stop early. All processes ask together."""
        patience, processes = self.learner.config.patience, self.learner.processes
        if not patience:
            return False
        return bool(processes.sum(torch.tensor(float(self.since_best >= patience), device=processes.device)))

    def choose_weights(self, step: int) -> dict[str, Any]:
        """Leave in the averaged weights what the run ends with. Returns how it was chosen, for its record."""
        chosen: dict[str, Any] = {}
        learner = self.learner
        if not learner.processes.is_main:
            return chosen
        if learner.config.patience:
            chosen["early_stopping"] = {"stopped_at": step, "step": self.best_step, "score": self.best_score}
            for name, weight in learner.ema.weights.items():
                weight.copy_(self.best[name])
        if learner.config.wise_ft:
            chosen["wise_ft"] = wise_ft(learner, self.base, lambda: self._look(step, quick=True))
        if chosen:  # the last look is one at what is kept
            chosen["score"] = self._look(step).score
        return chosen

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the best weights into `folder`; returns what JSON can hold of the state."""
        if self.best:
            save_file(self.best, folder / BEST)
        return {name: getattr(self, name) for name in KEPT}

    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Take up what `save` wrote. Raises CheckpointError where it cannot be read."""
        for name, value in state.items():
            setattr(self, name, value)
        if self.learner.config.patience and self.best_step >= 0 and self.learner.processes.is_main:
            try:
                self.best = load_file(folder / BEST)
            except Exception as error:  # safetensors raises whatever its parser raises
                raise CheckpointError(f"{folder} cannot be resumed from: {error!r}") from error

    def _look(self, step: int, *, quick: bool = False) -> Validated:
        assert self.on_validate is not None
        learner = self.learner
        with learner.averaged_for_use():
            look = self.on_validate(Moment(step, learner.model, self.checkpoint, learner.config, quick))
        chooses = learner.config.patience or learner.config.wise_ft
        if chooses and self.measured_on not in ("", look.measured_on):
            raise OptionError(
                "the looks choose the weights, and this one is at other pairs than those before: resume the run with "
                "the --val that it was started with"
            )
        self.measured_on = look.measured_on
        return look

    def _compare(self, step: int, look: Validated) -> None:
        if self.best_step >= 0 and not look.score > self.best_score:
            self.since_best += 1
            return
        self.best_step, self.best_score, self.since_best = step, look.score, 0
        if self.learner.config.patience:
            weights = self.learner.ema.weights.items()
            self.best = {name: weight.detach().to("cpu", copy=True).contiguous() for name, weight in weights}
