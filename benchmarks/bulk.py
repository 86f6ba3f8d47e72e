"""Bulk indexing: images per second with one and two workers, next to a plain pipeline of Ray Data and transformers.

The images are small and the encoder is that of the built-in bundle, so that the time shows what surrounds the encoder.
Each run is a process of its own, with the start of Ray. The peer writes its embeddings to Parquet files.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, Process, options

HERE = Path(__file__).parent
IMAGES, SIZE, WORKERS = 100_000, (64, 64), (1, 2)


@click.command()
@options
@click.option("--images", default=IMAGES, show_default=True, help="Images indexed by each run.")
def main(images: int, **chosen: Any) -> None:
    """Measure bulk indexing of many small images."""
    job = HERE / "bulk_job.py"
    bench = Benchmark(__file__, "How fast are many images indexed?", depends=[job], **chosen)
    from indexing import write_images

    cases = {f"{images:,} images of {SIZE[0]} x {SIZE[1]}, workers: {workers}": workers for workers in WORKERS}
    wanted = {case: workers for case, workers in cases.items() if bench.wants(case)}
    if wanted:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_images(folder / "images", images, SIZE, "PNG")
            for case, workers in wanted.items():
                runs = {
                    kind: Process(
                        [sys.executable, "-W", "ignore", job, kind, folder / "images", folder / kind, workers]
                    )
                    for kind in ("unidiff", "ray")
                }
                # Calls, without the figures of `Process`: its peak memory leaves out the processes that Ray starts.
                bench.row(
                    case,
                    ours={"UniDiff": runs["unidiff"].__call__},
                    peers={"Ray Data + transformers": runs["ray"].__call__},
                    parameters={"images": images, "workers": workers},
                    items=images,
                    rounds=1,
                    warm_up=0,
                    note="UniDiff also hashes and copies the files, makes thumbnails and stores items with captions.",
                )
                check(folder, images)
    bench.finish()


def check(folder: Path, images: int) -> None:
    """Exit unless both runs have the same embedding of each image."""
    import numpy as np
    import pyarrow.parquet as pq

    from unidiff_sdk import Catalog

    table = pq.read_table(folder / "ray")
    names = (int(Path(path).stem) for path in table["path"].to_pylist())
    theirs = dict(zip(names, table["vector"].to_numpy(), strict=True))
    least, found = 1.0, 0
    with Catalog(folder / "unidiff") as catalog:
        for batch in catalog.parts().store.scroll():
            found += len(batch)
            least = min(least, *(float(np.dot(record.vector, theirs[record.payload["id"]])) for record in batch))
    if not found == len(theirs) == images or least < 0.9999:
        sys.exit(f"{found:,} and {len(theirs):,} of {images:,} images are encoded, and the least cosine is {least:.6f}")


if __name__ == "__main__":
    main()
