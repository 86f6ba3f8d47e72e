"""Scripts in processes of their own, whose peak memory is measured."""

from __future__ import annotations

import re
import subprocess
import sys

PEAK = """
import re
from pathlib import Path
print("peak", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
"""


def run_measured(script: str, *arguments: object) -> tuple[list[str], float]:
    """The lines of its output, and its peak memory in bytes."""
    done = subprocess.run(
        [sys.executable, "-c", script + PEAK, *map(str, arguments)], capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    peak = re.fullmatch(r"peak (\d+)", last)
    assert peak
    return lines, float(peak[1])
