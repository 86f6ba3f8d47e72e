"""Embeddings of synthetic products by the built-in model: `python benchmarks/gallery.py --items 100300`.

Rendering and encoding 100,000 products takes about seven minutes on two cores. The embeddings are therefore cached
under `.cache/gallery`, in parts of 500, and an interrupted run continues. Each image encoder has its own files.
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
    """Return unit embeddings float32[count, dim] of products of the three catalogs; compute the missing ones."""
    import numpy as np

    from unidiff_sdk import Bundle

    encoder = Bundle.open().manifest.files["image_encoder/model.onnx"][:12]
    parts = [CACHE / encoder / f"{number:04d}.npy" for number in range(-(-count // PART))]
    missing = [number for number, file in enumerate(parts) if not file.is_file()]
    if missing:
        with (
            ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool,
            click.progressbar(length=len(missing), label="Rendering and encoding") as bar,
        ):
            for _ in pool.map(_embed_part, missing, [parts[number] for number in missing]):
                bar.update(1)
    return np.concatenate([np.load(file) for file in parts])[:count]


def _embed_part(number: int, file: Path) -> None:
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
    """Render and encode the products that are not in the cache."""
    vectors = embeddings(items)
    click.echo(f"{CACHE}: {len(vectors):,} embeddings of {vectors.shape[1]} dimensions")


if __name__ == "__main__":
    main()
