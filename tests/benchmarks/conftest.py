"""What all tests of benchmarks share."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import harness


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness collects garbage before each round: a quarter of a second with the objects of a test run."""
    monkeypatch.setattr(harness, "gc", SimpleNamespace(collect=lambda: None))
