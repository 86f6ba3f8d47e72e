"""8-bit vectors beside float32 ones: a catalog of 100,000 both ways, and one of 1,000,000 with `quantization`.

The 1,000,000 are the 100,000 embeddings of drawn products (`gallery.py`) ten times over, each with noise of its own of
half the usual distance to the nearest neighbor, turned into 512 dimensions. Each catalog is opened by a process of
its own, whose resident memory after all queries is told; files that it has mapped and touched count.

Not part of `make bench`: the large one alone takes some fifteen minutes and 10 GB of disk.
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
@click.option("--items", default=100_000, show_default=True, help="The smaller catalog.")
@click.option("--times", default=10, show_default=True, help="How many times as large the larger one is.")
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
    """Stored ones and queries, float32[items * copies, 512] and float32[QUERIES, 512], of length 1."""
    import numpy as np
    from engines import truth
    from search import drawn, turn

    stored, asked = np.split(drawn(items + QUERIES), [items])
    if copies > 1:
        rng = np.random.default_rng(2)
        usual = float(np.median(np.sqrt(np.maximum(0, 2 - 2 * truth(stored, asked, None, rank=1)))))
        size = usual / 2 / np.sqrt(stored.shape[1])
        noisy = (stored + size * rng.standard_normal(stored.shape, dtype=np.float32) for _ in range(copies))
        stored = np.concatenate([rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in noisy])
    return turn(stored), turn(asked)


def measure(
    bench: Benchmark, case: str, folder: Path, stored: Any, asked: Any, quantizations: tuple[str | None, ...]
) -> None:
    """Build the catalogs one after another, then ask them and a plain matrix product in turn."""
    import numpy as np
    from engines import assess, filled_catalog, flat, truth

    tenth = truth(stored, asked, None)
    np.savez(folder / "questions.npz", asked=asked, tenth=tenth)
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
    figures["NumPy"] = assess(scan, stored, asked, tenth, None)
    try:
        bench.row(
            case,
            ours=workers,
            peers={"NumPy": lambda: scan(asked[0], None)},
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
