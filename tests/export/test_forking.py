"""Calls in a forked process, and an export that writes graphs in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch

from unidiff_export.bundle.forking import forked
from unidiff_sdk.errors import CheckpointError, ExportError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks")


def refuse() -> None:
    raise CheckpointError("no weights")


def test_call_runs_in_another_process_on_one_core() -> None:
    with forked(lambda: (os.getpid(), torch.get_num_threads())) as result:
        process, threads = result()
    assert process != os.getpid() and threads == 1


def test_error_of_the_call_is_raised() -> None:
    with forked(refuse) as result, pytest.raises(CheckpointError, match="no weights"):
        result()


def test_killed_process_is_an_error() -> None:
    with forked(lambda: os.kill(os.getpid(), signal.SIGKILL)) as result, pytest.raises(ExportError, match="code -9"):
        result()


def test_process_ends_with_the_block(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with pytest.raises(KeyError), forked(lambda: (started.write_text(str(os.getpid())), time.sleep(60))):
        while not (started.exists() and started.read_text()):
            time.sleep(0.01)
        raise KeyError
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.slow
def test_forked_export_writes_the_same_graphs(random_checkpoint: Path, tmp_path: Path) -> None:
    """Each export is a program of its own, because the names of values depend on what was lowered before."""
    program = (
        "import sys, torch; from unidiff_export import export_bundle; torch.set_num_threads(2);"
        "export_bundle(sys.argv[1], sys.argv[2], fork=sys.argv[3] == 'fork')"
    )
    for name in ("fork", "plain"):
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, random_checkpoint, tmp_path / name, name], check=True
        )
    graphs = sorted(path.relative_to(tmp_path / "fork") for path in (tmp_path / "fork").glob("*/model.onnx"))
    assert len(graphs) == 5
    for graph in graphs:
        one, other = (onnx.load(tmp_path / name / graph) for name in ("fork", "plain"))
        assert one == other, graph
