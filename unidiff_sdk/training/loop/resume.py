"""A run that was stopped goes on where it was: the state beside its last checkpoint, and whose state it is.

    OUT/training_state/    state.json and what the learner keeps, until the run is finished

It is part of the checkpoint's folder, so both appear together or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unidiff_sdk.errors import CheckpointError, TrainingError
from unidiff_sdk.training.checkpoints.checkpoint import TRAINING_STATE as STATE
from unidiff_sdk.training.config import TrainingConfig

from .learner import Learner
from .model_selection import Looks

__all__ = ["Progress", "read_finished", "restore", "unfinished", "write_state"]

SCHEMA_VERSION = 2
# Settings that do not decide the weights: another value may be given when a run goes on.
HARMLESS = ("save_every", "keep", "validate_every")


@dataclass
class Progress:
    """How far a run is. step: steps done."""

    step: int = 0
    losses: dict[str, float] = field(default_factory=dict)


def unfinished(out: Path) -> bool:
    """Whether a run left its state in `out` and can go on."""
    return (out / STATE / "state.json").is_file()


def write_state(
    out: Path,
    learner: Learner,
    looks: Looks,
    weights: Mapping[str, Tensor],
    progress: Progress,
    identity: Mapping[str, Any],
) -> None:
    """Write the state into the checkpoint folder `out`.

    weights: those that learn, see `Learner.save`. identity: what another run must share to go on from here.
    """
    kept = learner.save(out / STATE, weights)
    content = {
        "schema_version": SCHEMA_VERSION,
        "progress": asdict(progress),
        "learner": kept,
        "looks": looks.save(out / STATE),
        "config": asdict(learner.config),
        "identity": dict(identity),
    }
    (out / STATE / "state.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def restore(out: Path, learner: Learner, looks: Looks, identity: Mapping[str, Any]) -> Progress:
    """Bring the learner and the looks to where the run in `out` stopped.

    Raises TrainingError where that run had other settings, another base or other data; CheckpointError where its state
    cannot be read.
    """
    content = _read(out / STATE / "state.json")
    if content.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{out} was left by another version of this program (schema {content.get('schema_version')}, "
            f"not {SCHEMA_VERSION}): resume it with that one"
        )
    _require_same_run(out, content, learner.config, identity)
    learner.restore(out / STATE, content["learner"])
    looks.restore(out / STATE, content["looks"])
    return Progress(**content["progress"])


def read_finished(out: Path, config: TrainingConfig, identity: Mapping[str, Any]) -> Progress:
    """What the finished run in `out` came to. Raises TrainingError where it is not the run that was asked for."""
    meta = _read(out / "unidiff.json")
    if not meta.keys() >= {"config", "identity", "step", "losses"}:
        raise TrainingError(f"{out} is no run that could be resumed: leave --resume out, or name another folder")
    _require_same_run(out, meta, config, identity)
    return Progress(meta["step"], meta["losses"])


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content


def _require_same_run(
    out: Path, content: Mapping[str, Any], config: TrainingConfig, identity: Mapping[str, Any]
) -> None:
    # Through JSON and back, as the other side went: tuples become lists.
    ours = json.loads(json.dumps({"config": asdict(config), "identity": dict(identity)}))
    harmless = set(HARMLESS) - ({"validate_every"} if config.patience else set())  # then the looks decide the weights
    for of in ("config", "identity"):
        for name in ours[of].keys() | content[of].keys():
            now, then = ours[of].get(name), content[of].get(name)
            if name not in harmless and now != then:
                raise TrainingError(
                    f"the run in {out} has {name} {then!r}, not {now!r}: resume it with what it was started with, or "
                    "name another folder for a new run"
                )
