"""Resuming a run: its state is saved with the last checkpoint, together with what identifies the run.

    OUT/training_state/    state.json and the tensors of the learner, until the run is finished

The state is part of the checkpoint folder, so that both appear together or not at all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unidiff_sdk._internal.json_values import damaged_content, number_within
from unidiff_sdk.errors import CheckpointError, TrainingError
from unidiff_sdk.training.checkpoints.checkpoint import METADATA
from unidiff_sdk.training.checkpoints.json_files import read_json
from unidiff_sdk.training.checkpoints.saving import TRAINING_STATE
from unidiff_sdk.training.config import TrainingConfig, with_current_names
from unidiff_sdk.training.data.hard_negatives import HardNegatives

from .learner import Learner
from .model_selection import ModelSelection

__all__ = ["Progress", "read_finished", "restore", "unfinished", "write_state"]

SCHEMA_VERSION = 3
# Settings that do not affect the weights. They may change when a run is resumed.
UNRELATED_TO_WEIGHTS = {"save_every", "keep", "validate_every", "shard"}
MAX_STEPS = 10**9
# Names of schema 2, in the state of the model selection and in the losses.
SELECTION_NAMES_2 = {
    "looked": "validated_step",
    "measured_on": "data_fingerprint",
    "since_best": "validations_since_best",
}
LOSS_NAMES_2 = {"leash": "feature_distillation", "prior_leash": "prior_feature_distillation"}


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: Steps done.
        losses: Value of each term in the last step.
    """

    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)


def unfinished(out: Path) -> bool:
    """Whether `out` holds the state of a run that can be resumed."""
    return (out / TRAINING_STATE / "state.json").is_file()


def write_state(
    out: Path,
    learner: Learner,
    selection: ModelSelection,
    negatives: HardNegatives | None,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    progress: Progress,
    identity: Mapping[str, Any],
) -> None:
    """Write the state into the checkpoint folder `out`.

    weights, optimizer: see `Learner.save`. identity: What a resumed run must have in common.
    """
    folder = out / TRAINING_STATE
    content = {
        "schema_version": SCHEMA_VERSION,
        "progress": asdict(progress),
        "learner": learner.save(folder, weights, optimizer),
        "selection": selection.save(folder),
        "config": asdict(learner.config),
        "identity": dict(identity),
    }
    if negatives:
        negatives.save(folder)
    (folder / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def restore(
    out: Path,
    learner: Learner,
    selection: ModelSelection,
    negatives: HardNegatives | None,
    identity: Mapping[str, Any],
) -> Progress:
    """Restore learner, model selection and hard negatives to the state of the run in `out`.

    Raises:
        TrainingError: The run has other settings, another base or other data.
        CheckpointError: The state cannot be read.
    """
    folder = out / TRAINING_STATE
    with damaged_content(folder, CheckpointError, "Remove it to start again."):
        content = _upgrade(out, read_json(folder / "state.json"))
        _require_same_run(out, content, learner.config, identity)
        progress = _progress(content["progress"]["step"], content["progress"]["losses"])
        learner.restore(folder, content["learner"])
        selection.restore(folder, content["selection"])
        if negatives:
            negatives.restore(folder)
        return progress


def read_finished(out: Path, config: TrainingConfig, identity: Mapping[str, Any]) -> Progress:
    """Final progress of the finished run in `out`. Raises TrainingError if it is another run."""
    meta = read_json(out / METADATA)
    if not meta.keys() >= {"config", "identity", "step", "losses"}:
        raise TrainingError(f"{out} holds no run that can be resumed. Omit --resume, or name another folder.")
    with damaged_content(out / METADATA, CheckpointError, "Restore it from a backup, or name another folder."):
        _require_same_run(out, meta, config, identity)
        return _progress(meta["step"], _renamed(meta["losses"], LOSS_NAMES_2))


def _progress(step: Any, losses: Mapping[str, Any]) -> Progress:
    """The recorded progress, with its types checked. A loss that is not finite ended its run."""
    largest = sys.float_info.max
    values = {name: number_within(name, loss, -largest, largest, CheckpointError) for name, loss in losses.items()}
    return Progress(int(number_within("step", step, 0, MAX_STEPS, CheckpointError, whole=True)), values)


def _upgrade(out: Path, content: dict[str, Any]) -> dict[str, Any]:
    """The content of state.json in the current schema. Schema 2 has the same content under other names."""
    version = content.get("schema_version")
    if version == 2:
        progress = content["progress"]
        return content | {
            "selection": _renamed(content["looks"], SELECTION_NAMES_2),
            "progress": progress | {"losses": _renamed(progress["losses"], LOSS_NAMES_2)},
        }
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"The run in {out} was saved in schema {version}; this version reads schemas 2 and {SCHEMA_VERSION}. "
            "Resume it with the version that saved it, or name another folder."
        )
    return content


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in values.items()}


def _require_same_run(
    out: Path, content: Mapping[str, Any], config: TrainingConfig, identity: Mapping[str, Any]
) -> None:
    # Through JSON and back, like the recorded values: tuples become lists.
    ours = json.loads(json.dumps({"config": asdict(config), "identity": dict(identity)}))
    # A version without a setting worked as its default does.
    theirs = {
        "config": json.loads(json.dumps(asdict(TrainingConfig()))) | with_current_names(content["config"]),
        "identity": content["identity"],
    }
    ignored = UNRELATED_TO_WEIGHTS - ({"validate_every"} if config.patience else set())  # then validation chooses them
    for section in ("config", "identity"):
        for name in ours[section].keys() | theirs[section].keys():
            now, then = ours[section].get(name), theirs[section].get(name)
            if name not in ignored and now != then:
                raise TrainingError(
                    f"The run in {out} has {name} {then!r}, not {now!r}. Resume it with the values it was started "
                    "with, or name another folder for a new run."
                )
