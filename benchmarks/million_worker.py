"""Search a catalog of `million.py` in a separate process: `python million_worker.py CATALOG FOLDER`."""

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
    """Open the catalog, answer all queries, and then one query per call."""
    shop, folder = Path(sys.argv[1]), Path(sys.argv[2])
    stored = np.load(folder / "vectors.npy", mmap_mode="r")
    arrays = np.load(folder / "queries.npz")
    queries, least_scores = arrays["queries"], arrays["least_scores"]
    with Catalog(shop, create=False) as catalog:
        search = search_by(catalog)
        figures = assess(search, stored, queries, least_scores, None) | {"rss_mib": resident()}
        endless = itertools.cycle(queries)
        serve(lambda: search(next(endless), None), figures=lambda: figures)


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return round(int(found[1]) / 1024)


if __name__ == "__main__":
    main()
