"""Fixtures of several test files: a toy bundle, a random checkpoint and a small catalog."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# The models of the tests are too small for several threads. On a busy machine OpenMP's threads wait for each other
# instead: two tests on two threads took 18 times as long as on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from unidiff_sdk import Catalog


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose graphs have one or two nodes."""
    from support.toy_bundle import make_toy_bundle

    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def catalog(tmp_path: Path, toy: Path) -> Iterator[Catalog]:
    """An empty catalog in a folder, with the toy bundle."""
    from unidiff_sdk import Catalog

    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        yield catalog


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with random weights: 32 px, latents 4x16x16, text and embeddings of width 32, 16 tokens."""
    pytest.importorskip("torch", reason="needs the train extra")
    from support.random_checkpoint import make_random_checkpoint

    return make_random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "random")


@pytest.fixture(scope="session")
def small_catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images of one color each, not all square, with captions that name it. Two captions mean the same."""
    import json

    from PIL import Image

    folder = tmp_path_factory.mktemp("catalog")
    colors = ("red", "green", "blue", "purple", "yellow", "teal", "black", "white", "orange", "brown", "pink")
    rows = [{"text": f"a {color} dress", "colour": color, "price": 10.0 + i} for i, color in enumerate(colors)]
    rows.append({"text": "A red  dress.", "colour": "red", "price": 99.0})
    for i, row in enumerate(rows):
        row["file_name"] = f"{i}.png"
        Image.new("RGB", (40, 40 + 4 * i), str(row["colour"])).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an S3 server on loopback, which fsspec finds by the environment."""
    import os

    s3fs = pytest.importorskip("s3fs", reason="make test-objects has it")
    from support import object_stores

    with object_stores.s3_server(tmp_path_factory.mktemp("s3")) as url:
        s3fs.S3FileSystem.clear_instance_cache()  # those of an earlier server
        before = dict(os.environ)
        os.environ |= object_stores.s3_environment(url)
        yield url
        os.environ.clear()
        os.environ |= before
