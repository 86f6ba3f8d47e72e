"""Scripts in processes of their own, whose peak memory is measured."""

from __future__ import annotations

import os
import re
import subprocess
import sys

PEAK = """
import re
from pathlib import Path
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""

# Arguments: a folder with model.onnx, and the inputs and the expected outputs of one call. Prints the largest error.
RUN_GRAPH = """
import sys
from pathlib import Path
import numpy as np
from unidiff_sdk.inference.sessions import create_session

out = Path(sys.argv[1])
session = create_session(out / "model.onnx")
results = session.run(dict(np.load(out / "inputs.npz")))
expected = np.load(out / "outputs.npz")
assert set(results) == set(expected)
print(max(np.abs(results[name] - expected[name]).max() / max(1, np.abs(expected[name]).max()) for name in expected))
"""


def run_measured(script: str, *arguments: object) -> tuple[list[str], float]:
    """The lines of its output, and its peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", script + PEAK, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    peak = re.fullmatch(r"peak (\d+)", last)
    assert peak
    return lines, float(peak[1])
