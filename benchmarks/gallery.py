"""The built-in model's embeddings of drawn products, as a file: `python benchmarks/gallery.py --items 100300`.

Drawing 100,000 products takes some seven minutes of two cores, so what is done is kept under `.cache/gallery`, a part
of 500 at a time, and a run that was cut short goes on after it. Another image encoder has other files.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import click
from harness import ROOT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from unidiff_sdk.inference.encoder import Encoder

CACHE = ROOT / ".cache" / "gallery"
PART = 500


def embeddings(count: int) -> NDArray[np.float32]:
    """Unit embeddings float32[count, dim] of as many products, the three catalogs in turn; drawn if need be."""
    import numpy as np

    from unidiff_sdk import Bundle

    encoder = Bundle.open().manifest.files["image_encoder/model.onnx"][:12]
    parts = [CACHE / encoder / f"{number:04d}.npy" for number in range(-(-count // PART))]
    missing = [number for number, file in enumerate(parts) if not file.is_file()]
    if missing:
        with (
            ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            click.progressbar(length=len(missing), label="Drawing and encoding") as bar,
        ):
            for _ in pool.map(_draw, missing, [parts[number] for number in missing]):
                bar.update(1)
    return np.concatenate([np.load(file) for file in parts])[:count]


def _draw(number: int, file: Path) -> None:
    import numpy as np

    from unidiff_sdk.datasets.synthetic import CATALOGS, products, render

    chosen = products(CATALOGS[number % len(CATALOGS)], PART, seed=number, split="test")
    vectors = _encoder().encode_images(render(product) for product in chosen)
    file.parent.mkdir(parents=True, exist_ok=True)
    sibling = file.with_suffix(".part")
    with sibling.open("wb") as handle:
        np.save(handle, vectors)
    sibling.replace(file)


@cache
def _encoder() -> Encoder:
    from unidiff_sdk import Bundle
    from unidiff_sdk.inference.encoder import Encoder

    return Encoder(Bundle.open(threads=1))


@click.command()
@click.option("--items", default=100_300, show_default=True, help="How many products.")
def main(items: int) -> None:
    """Draw and encode what is not there yet."""
    vectors = embeddings(items)
    click.echo(f"{CACHE}: {len(vectors):,} embeddings of {vectors.shape[1]} numbers")


if __name__ == "__main__":
    main()
