"""Run the benchmark of the server: `python benchmarks/serving`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the modules of this folder are imported as a package

from serving.command import main  # noqa: E402

if __name__ == "__main__":
    main(prog_name="serving")
