"""The notebooks run from top to bottom, and what is saved of them is small and names no path of a machine."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

from .pages import DOCS

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
LARGEST = 200_000  # bytes, with outputs
SLOW = {"fine_tune_and_export"}  # trains and exports: a minute


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """`docs/run_notebooks.py`, which also saves the outputs."""
    spec = importlib.util.spec_from_file_location("run_notebooks", DOCS / "run_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, id=file.stem, marks=pytest.mark.slow if file.stem in SLOW else ()) for file in NOTEBOOKS],
)
def test_notebook_runs(file: Path, runner: ModuleType) -> None:
    if file.stem in SLOW:
        pytest.importorskip("torch", reason="needs the train and export extras")
    saved = json.loads(file.read_text(encoding="utf-8"))
    run = runner.run(file)
    assert [kinds(cell) for cell in run.cells] == [kinds(cell) for cell in saved["cells"]]  # saved with its outputs


def kinds(cell: dict) -> list[str]:
    """What a cell shows: the kinds of its outputs."""
    return [output["output_type"] for output in cell.get("outputs", ())]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_saved_notebook_is_small_and_clean(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text) <= LARGEST
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", ())]
    assert outputs, f"{file.name} is saved without outputs: python docs/run_notebooks.py {file.name}"
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not re.search(r"(/home/|/root/|/tmp/|/Users/)", json.dumps(outputs))
