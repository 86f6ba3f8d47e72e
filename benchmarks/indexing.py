"""Pictures a second into a catalog, and whether its size shows in the memory that this takes.

The encoder is shaped as CLIP's ViT-B/32 (`vit.py`), the pictures are JPEG files of 640 x 480. Ours reads them, hashes,
decodes, encodes, makes thumbnails, copies and stores; the peers decode with PIL, process and encode with transformers
and keep the vectors in a list.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from harness import Benchmark, Process, options

if TYPE_CHECKING:
    from unidiff_sdk import Bundle

HERE = Path(__file__).parent
PICTURES, SIZE = 64, (640, 480)
SMALL, FACTOR = 1000, 8  # pictures of 64 px, for the memory: so many, and so many times as many
INDEX = """
import sys
from unidiff_sdk import Catalog
with Catalog(sys.argv[2]) as catalog:
    assert catalog.add_folder(sys.argv[1]).added == int(sys.argv[3])
"""


@click.command()
@options
@click.option("--pictures", default=PICTURES, show_default=True, help="How many are indexed in a round.")
@click.option("--small", default=SMALL, show_default=True, help="The smaller of the catalogs for the memory.")
def main(pictures: int, small: int, **chosen: Any) -> None:
    """Measure indexing with a ViT-B/32 beside a plain loop, and the memory of two sizes."""
    bench = Benchmark(__file__, "How fast are pictures indexed?", depends=[HERE / "vit.py"], **chosen)
    case = f"ViT-B/32, {pictures} pictures of {SIZE[0]} x {SIZE[1]}"
    if bench.wants(case):
        with tempfile.TemporaryDirectory() as folder:
            rate(bench, case, pictures, Path(folder))
    for count in (small, FACTOR * small):
        if bench.wants(case := f"memory, {count:,} pictures of 64 x 64, tiny bundle"):
            with tempfile.TemporaryDirectory() as folder:
                memory(bench, case, count, Path(folder))
    bench.finish()


def rate(bench: Benchmark, case: str, count: int, folder: Path) -> None:
    """Index a folder anew each time, with the fp32 and the int8 bundle, beside the loop."""
    import torch
    from vit import vit_bundle, vit_checkpoint

    from unidiff_sdk import Bundle

    torch.set_num_threads(bench.threads)
    checkpoint = vit_checkpoint()
    bundles = {
        precision: Bundle.open(vit_bundle(checkpoint, precision), threads=bench.threads)
        for precision in ("fp32", "int8")
    }
    files = write_pictures(folder / "pictures", count, SIZE, "JPEG")
    bench.row(
        case,
        ours={
            f"UniDiff {precision}": indexes(folder / "pictures", bundle, folder)
            for precision, bundle in bundles.items()
        },
        peers={
            "transformers + PIL, one by one": plain_loop(checkpoint, files, 1),
            "transformers + PIL, 32 at once": plain_loop(checkpoint, files, 32),
        },
        parameters={"items": count},
        items=count,
        note="Ours also hashes and copies the files, makes thumbnails and stores all of it; the peers keep a list.",
    )


def indexes(pictures: Path, bundle: Bundle, folder: Path) -> Callable[[], None]:
    """A contestant that indexes into a new catalog."""
    from unidiff_sdk import Catalog

    def index() -> None:
        shop = folder / "shop.catalog"
        shutil.rmtree(shop, ignore_errors=True)
        with Catalog(shop, bundle) as catalog:
            catalog.add_folder(pictures)

    return index


def plain_loop(checkpoint: Any, files: list[Path], batch: int) -> Callable[[], None]:
    """What a page of transformers' documentation does."""
    import torch
    from PIL import Image

    def encode() -> None:
        vectors = []
        for start in range(0, len(files), batch):
            images = [Image.open(file).convert("RGB") for file in files[start : start + batch]]
            pixels = checkpoint.image_processor(images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                clip = checkpoint.clip
                rows = clip.visual_projection(clip.vision_model(pixels).pooler_output)
            vectors.extend(torch.nn.functional.normalize(rows, dim=-1).numpy())

    return encode


def memory(bench: Benchmark, case: str, count: int, folder: Path) -> None:
    """A process that indexes so many pictures, once; the most memory that it had is what counts."""
    write_pictures(folder / "pictures", count, (64, 64), "PNG")
    argv = [sys.executable, "-W", "ignore", "-c", INDEX, folder / "pictures", folder / "shop.catalog", str(count)]
    bench.row(
        case,
        ours={"UniDiff": Process(argv)},
        peers={},
        parameters={"pictures": count},
        items=count,
        rounds=1,
        warm_up=0,
    )


def write_pictures(folder: Path, count: int, size: tuple[int, int], kind: str) -> list[Path]:
    """So many different pictures, coarse noise smoothed, with their table."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng, rows, files = np.random.default_rng(0), [], []
    for k in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = folder / f"{k:06d}.{kind.lower()}"
        noise.resize(size, Image.Resampling.BICUBIC).save(file, kind)
        rows.append(json.dumps({"file_name": file.name, "text": f"picture {k}", "id": k}))
        files.append(file)
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return files


if __name__ == "__main__":
    main()
