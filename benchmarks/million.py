"""8-bit vectors compared with float32: a catalog of 100,000 vectors in both, and one of 1,000,000 in 8 bits.

The 1,000,000 vectors are ten copies of the 100,000 embeddings of synthetic products (`gallery.py`), rotated into 512
dimensions. Each copy gets independent noise of half the median distance to the nearest neighbor. Each catalog is opened
in its own process, and its resident memory after all queries is reported, including mapped pages that it has touched.

Not part of `make bench`: the larger catalog alone takes about fifteen minutes and 10 GB of disk.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, Worker, options

HERE = Path(__file__).parent
DEPENDS = [HERE / name for name in ("million_worker.py", "engines.py", "gallery.py", "search.py")]
QUERIES = 300
NAMES = {None: "UniDiff, float32", "scalar": "UniDiff, 8-bit"}


@click.command()
@options
@click.option("--items", default=100_000, show_default=True, help="Size of the smaller catalog.")
@click.option("--times", default=10, show_default=True, help="Size of the larger catalog as a multiple.")
def main(items: int, times: int, **chosen: Any) -> None:
    """Measure catalogs of 8-bit and of float32 vectors."""
    bench = Benchmark(__file__, "What do 8-bit vectors cost and save?", depends=DEPENDS, **chosen)
    for copies, quantizations in ((1, (None, "scalar")), (times, ("scalar",))):
        case = f"embeddings, {items * copies:,} x 512"
        if bench.wants(case):
            with tempfile.TemporaryDirectory() as folder:
                measure(bench, case, Path(folder), *vectors(items, copies), quantizations)
    bench.finish()


def vectors(items: int, copies: int) -> tuple[Any, Any]:
    """Return stored vectors and queries: unit vectors float32[items * copies, 512] and float32[QUERIES, 512]."""
    import numpy as np
    from engines import score_of_rank
    from search import rotate, shuffled_embeddings

    stored, queries = np.split(shuffled_embeddings(items + QUERIES), [items])
    if copies > 1:
        rng = np.random.default_rng(2)
        distance = float(np.median(np.sqrt(np.maximum(0, 2 - 2 * score_of_rank(stored, queries, None, rank=1)))))
        scale = distance / 2 / np.sqrt(stored.shape[1])
        noisy = (stored + scale * rng.standard_normal(stored.shape, dtype=np.float32) for _ in range(copies))
        stored = np.concatenate([copy / np.linalg.norm(copy, axis=1, keepdims=True) for copy in noisy])
    return rotate(stored), rotate(queries)


def measure(
    bench: Benchmark, case: str, folder: Path, stored: Any, queries: Any, quantizations: tuple[str | None, ...]
) -> None:
    """Build the catalogs one after another, then query them and a plain matrix product in turns."""
    import numpy as np
    from engines import assess, filled_catalog, flat, score_of_rank

    least_scores = score_of_rank(stored, queries, None)
    np.savez(folder / "queries.npz", queries=queries, least_scores=least_scores)
    np.save(folder / "vectors.npy", stored)
    workers: dict[str, Worker] = {}
    figures: dict[str, dict[str, float]] = {}
    for quantization in quantizations:
        name, shop = NAMES[quantization], folder / f"{quantization}.catalog"
        started = time.perf_counter()
        with filled_catalog(shop, stored, quantization=quantization) as catalog:
            click.echo(f"{case}: {name}: filled after {time.perf_counter() - started:.0f} s", err=True)
            catalog.optimize()
        disk = sum(file.stat().st_blocks for file in (shop / "vectors").rglob("*") if file.is_file()) / 2048
        figures[name] = {"build_s": round(time.perf_counter() - started, 1), "disk_mib": round(disk)}
        workers[name] = Worker([sys.executable, HERE / "million_worker.py", shop, folder])
    scan = flat(stored).search
    figures["NumPy"] = assess(scan, stored, queries, least_scores, None)
    try:
        bench.row(
            case,
            ours=workers,
            peers={"NumPy": lambda: scan(queries[0], None)},
            figures=figures,
            parameters={"items": len(stored)},
            rounds=30,
        )
    finally:
        for worker in workers.values():
            worker.close()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
