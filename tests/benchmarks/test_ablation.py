"""The bookkeeping of `benchmarks/ablation.py`, and the interpolation of its WiSE-FT arm."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import ablation
from ablation import DEVELOPMENT, Run, collect, restore


def write_result(file: Path, runs: list[Run], **bases: float) -> None:
    content = {"runs": [{"run": asdict(run), "figures": {"r@1": 0.5}} for run in runs], "bases": bases}
    file.write_text(json.dumps(content), encoding="utf-8")


def test_runs_from_a_base_of_another_machine_stay_in_the_result(tmp_path: Path) -> None:
    work, result = tmp_path / "work", tmp_path / "result" / "ablation.json"
    (work / "bases" / "fashion-woman").mkdir(parents=True)
    result.parent.mkdir()
    elsewhere = Run("test", "fashion-man", 200, "SD alone", 1, 0)
    here = Run("test", "fashion-woman", 200, "SD alone", 1, 0)
    developed = Run("development", DEVELOPMENT, 200, "SD alone", 1, 0)
    write_result(result, [elsewhere, here, developed], **{"fashion-man": 0.9})
    restore(work, result)
    assert {file.name for file in work.glob("*.json")} == {here.name, developed.name}

    new = Run("test", "fashion-woman", 200, "SD alone", 1, 1)
    (work / new.name).write_text(json.dumps({"run": asdict(new), "figures": {"r@1": 0.7}}), encoding="utf-8")
    collect(work, result)
    content = json.loads(result.read_text("utf-8"))
    assert sorted(Run(**one["run"]).name for one in content["runs"]) == sorted(
        run.name for run in (elsewhere, here, developed, new)
    )
    assert content["bases"] == {"fashion-man": 0.9}


def test_interpolation_leaves_the_share_of_the_change(random_checkpoint: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the train extra")
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
    from unidiff_sdk.training.objective.joint_model import JointModel

    base, tuned = (JointModel(load_checkpoint(random_checkpoint)) for _ in range(2))
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(1.0)
    ablation._interpolate(tuned, base, 0.25)
    shifts = {
        name: round(float((weight - other).detach().mean()), 5)
        for (name, weight), other in zip(tuned.named_parameters(), base.parameters(), strict=True)
    }
    assert set(shifts.values()) == {0.25, 1.0}
    assert all(name.startswith("vae.") == (shift == 1.0) for name, shift in shifts.items())
