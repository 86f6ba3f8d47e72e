"""Each contestant of `benchmarks/training_step.py` takes one step, with a random model instead of the measured ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import training_step


def test_all_contestants_train(random_checkpoint: Path) -> None:
    pytest.importorskip("torch", reason="needs the train extra")
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    names = set()
    for case, contestants, _ in training_step._cases(lambda: load_checkpoint(random_checkpoint), batch=4):
        ours, peers = contestants()
        for name, step in (ours | peers).items():
            assert training_step._flop(step) > 0, (case, name)
            names.add(name)
    assert {training_step.OURS, training_step.PLAIN, training_step.SCORES, training_step.REWARD} < names
