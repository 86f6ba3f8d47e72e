"""Indexing: images per second, and peak memory for catalogs of two sizes.

The encoder has the shape of CLIP's ViT-B/32 (`vit.py`); the images are JPEG files of 640 x 480 pixels. UniDiff reads,
hashes, decodes and encodes them, makes thumbnails, copies and stores. The peers decode with PIL, preprocess and encode
with transformers, and keep the embeddings in a list. On processors with bfloat16, OpenVINO also runs the fp32 bundle.
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
IMAGES, SIZE = 64, (640, 480)
SMALL, FACTOR = 1000, 8  # images of 64 px in the smaller catalog for the memory; the larger one has FACTOR times more
INDEX = """
import sys
from unidiff_sdk import Catalog
with Catalog(sys.argv[2]) as catalog:
    assert catalog.add_folder(sys.argv[1]).added == int(sys.argv[3])
"""


@click.command()
@options
@click.option("--images", default=IMAGES, show_default=True, help="Images indexed in a round.")
@click.option("--small", default=SMALL, show_default=True, help="Size of the smaller catalog for the memory.")
def main(images: int, small: int, **chosen: Any) -> None:
    """Measure indexing with a ViT-B/32 next to a plain loop, and the memory of two sizes."""
    bench = Benchmark(__file__, "How fast are images indexed?", depends=[HERE / "vit.py"], **chosen)
    case = f"ViT-B/32, {images} images of {SIZE[0]} x {SIZE[1]}"
    if bench.wants(case):
        with tempfile.TemporaryDirectory() as folder:
            rate(bench, case, images, Path(folder))
    for count in (small, FACTOR * small):
        if bench.wants(case := f"memory, {count:,} images of 64 x 64, tiny bundle"):
            with tempfile.TemporaryDirectory() as folder:
                memory(bench, case, count, Path(folder))
    bench.finish()


def rate(bench: Benchmark, case: str, count: int, folder: Path) -> None:
    """Index a folder into a new catalog with the fp32 and the int8 bundle, next to the plain loop."""
    import torch
    from vit import vit_checkpoint

    torch.set_num_threads(bench.threads)
    checkpoint = vit_checkpoint()
    files = write_images(folder / "images", count, SIZE, "JPEG")
    bench.row(
        case,
        ours={
            name: indexes(folder / "images", bundle, folder)
            for name, bundle in open_bundles(checkpoint, bench.threads).items()
        },
        peers={
            "transformers + PIL, batch 1": plain_loop(checkpoint, files, 1),
            "transformers + PIL, batch 32": plain_loop(checkpoint, files, 32),
        },
        parameters={"items": count},
        items=count,
        note="UniDiff also hashes and copies the files, makes thumbnails and stores everything. The peers keep a list.",
    )


def open_bundles(checkpoint: Any, threads: int) -> dict[str, Bundle]:
    """Return the contestants' bundles, with OpenVINO only where it is installed and the processor has bfloat16."""
    from vit import vit_bundle

    from unidiff_sdk import Bundle
    from unidiff_sdk.errors import ProviderError

    folders = {precision: vit_bundle(checkpoint, precision) for precision in ("fp32", "int8")}
    bundles = {f"UniDiff {precision}": Bundle.open(path, threads=threads) for precision, path in folders.items()}
    bfloat16 = Bundle.open(folders["fp32"], threads=threads, device="openvino", precision="bf16")
    try:
        bfloat16.session("image_encoder")
    except ProviderError:
        return bundles
    return bundles | {"UniDiff fp32, OpenVINO bf16": bfloat16}


def indexes(images: Path, bundle: Bundle, folder: Path) -> Callable[[], None]:
    """Return a contestant that indexes into a new catalog."""
    from unidiff_sdk import Catalog

    def index() -> None:
        shop = folder / "shop.catalog"
        shutil.rmtree(shop, ignore_errors=True)
        with Catalog(shop, bundle) as catalog:
            catalog.add_folder(images)

    return index


def plain_loop(checkpoint: Any, files: list[Path], batch: int) -> Callable[[], None]:
    """Return a contestant that follows transformers' documentation."""
    import torch
    from PIL import Image

    def encode() -> None:
        vectors = []
        for start in range(0, len(files), batch):
            images = [Image.open(file).convert("RGB") for file in files[start : start + batch]]
            pixels = checkpoint.image_processor(images, return_tensors="pt")["pixel_values"]
            with torch.inference_mode():
                clip = checkpoint.clip
                embeddings = clip.visual_projection(clip.vision_model(pixels).pooler_output)
            vectors.extend(torch.nn.functional.normalize(embeddings, dim=-1).numpy())

    return encode


def memory(bench: Benchmark, case: str, count: int, folder: Path) -> None:
    """Measure the peak memory of a process that indexes `count` images once."""
    write_images(folder / "images", count, (64, 64), "PNG")
    argv = [sys.executable, "-W", "ignore", "-c", INDEX, folder / "images", folder / "shop.catalog", str(count)]
    bench.row(
        case,
        ours={"UniDiff": Process(argv)},
        peers={},
        parameters={"images": count},
        items=count,
        rounds=1,
        warm_up=0,
    )


def write_images(folder: Path, count: int, size: tuple[int, int], kind: str) -> list[Path]:
    """Write `count` different images of smoothed noise, and their metadata.jsonl."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng, rows, files = np.random.default_rng(0), [], []
    for k in range(count):
        noise = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = folder / f"{k:06d}.{kind.lower()}"
        noise.resize(size, Image.Resampling.BICUBIC).save(file, kind)
        rows.append(json.dumps({"file_name": file.name, "text": f"image {k}", "id": k}))
        files.append(file)
    (folder / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return files


if __name__ == "__main__":
    main()
