"""A catalog of `million.py` in a process of its own: `python million_worker.py CATALOG FOLDER`."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import numpy as np
from _worker import serve
from engines import assess, search_by

from unidiff_sdk import Catalog


def main() -> None:
    """Open it, answer all queries, and then one a call."""
    shop, folder = Path(sys.argv[1]), Path(sys.argv[2])
    stored = np.load(folder / "vectors.npy", mmap_mode="r")
    questions = np.load(folder / "questions.npz")
    with Catalog(shop, create=False) as catalog:
        search = search_by(catalog)
        figures = assess(search, stored, questions["asked"], questions["tenth"], None) | {"rss_mib": resident()}
        queries = itertools.cycle(questions["asked"])
        serve(lambda: search(next(queries), None), figures=lambda: figures)


def resident() -> float:
    """Memory of this process in MiB that is in RAM now."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return round(int(found[1]) / 1024)


if __name__ == "__main__":
    main()
