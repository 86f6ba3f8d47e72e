"""A catalog with a bundle that has no generator: everything works but generating, re-ranking and imagining."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_search_bundle, make_toy_bundle, seal

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.errors import BundleError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.manifest import Manifest

REFUSAL = r"has no generator: it searches, but cannot generate, re-rank \(rerank=\) or imagine"
COLORS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_search_bundle(tmp_path_factory.mktemp("search") / "bundle")


@pytest.fixture
def catalog(folder: Path, tmp_path: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle=folder) as catalog:
        images = [np.full((20, 16, 3), color, np.uint8) for color in COLORS.values()]
        catalog.add(images, list(COLORS), list(COLORS), [{"price": n} for n in range(3)])
        yield catalog


def test_bundle_states_that_it_has_no_generator(folder: Path) -> None:
    bundle = Bundle.open(folder, threads=1)
    assert not bundle.generates and "search only" in repr(bundle)
    assert [line.graph for line in bundle.warmup()] == ["text_encoder", "image_encoder"]
    assert bundle.profile("image_encoder") == {
        "pixel_values": {"min": [1, 3, 16, 16], "opt": [32, 3, 16, 16], "max": [32, 3, 16, 16]}
    }
    assert Manifest.from_json(bundle.manifest.to_json(), folder) == bundle.manifest
    for part in (lambda: bundle.latent, lambda: bundle.sampler, lambda: Generator(bundle)):
        with pytest.raises(BundleError, match=REFUSAL):
            part()


def test_searching_and_managing_work(catalog: Catalog) -> None:
    image = np.full((16, 20, 3), COLORS["green"], np.uint8)
    assert catalog.search(image=image, limit=1)[0].id == "green"
    assert catalog.search("red", where={"price": {"lt": 1}})[0].id == "red"
    assert catalog.search("red", image=image, limit=3, diversity=0.5)
    assert [hit.id for hit in catalog.search(like="blue", limit=1, unlike="red")] == ["green"]
    assert catalog.update("red", {"price": 9}) and catalog.get("red").payload["price"] == 9
    assert catalog.delete("red") == 1 and catalog.count() == 2
    assert catalog.info()["bundle"]["name"] == "toy" and not catalog.check().remaining


@pytest.mark.parametrize(
    "call",
    [
        lambda catalog: catalog.generate("red"),
        lambda catalog: catalog.search("red", imagine=1),
    ],
)
def test_calls_that_need_a_generator_say_so(catalog: Catalog, call: Callable[[Catalog], Any]) -> None:
    with pytest.raises(BundleError, match=REFUSAL + r".*unidiff-export CKPT --clip CLIP -o BUNDLE"):
        call(catalog)


def test_reranking_is_refused(catalog: Catalog, folder: Path, tmp_path: Path) -> None:
    for call in (
        lambda: catalog.search("red", rerank=2),
        lambda: catalog.prepare_rerank(),
        lambda: Catalog(tmp_path / "other.catalog", bundle=folder, rerank=True),
    ):
        with pytest.raises(BundleError, match=r"needs a generator, but .* has no unet and no vae_encoder"):
            call()


def test_reindexing_adds_and_removes_the_generator(catalog: Catalog, folder: Path, tmp_path: Path) -> None:
    whole = make_toy_bundle(tmp_path / "whole", seed=1)
    catalog.reindex(whole)
    assert len(catalog.generate("red", steps=1)) == 1
    catalog.reindex(folder)
    assert catalog.search("red", limit=1)
    with pytest.raises(BundleError, match=REFUSAL):
        catalog.generate("red")


@pytest.mark.parametrize("section", ["latent", "sampler"])
def test_generator_without_its_sizes_is_refused(tmp_path: Path, section: str) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest[section], manifest["checksum"]
    seal(bundle, manifest)
    with pytest.raises(BundleError, match=f"{section} is missing; it must be a JSON object"):
        Manifest.read(bundle)
