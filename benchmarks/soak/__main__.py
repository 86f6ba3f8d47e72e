"""Run the soak test: `python benchmarks/soak`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The modules of this folder are imported as a package, and the tests lend their small bundles and servers.
sys.path[0] = str(ROOT / "benchmarks")
sys.path.append(str(ROOT / "tests"))

from soak.command import main  # noqa: E402

if __name__ == "__main__":
    main(prog_name="soak")
