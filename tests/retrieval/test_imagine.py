"""Searches with generated images (imagine=): the mix against a plain computation, pages, batches, invalid arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.recorded import open_watched
from support.toy_bundle import DIM, make_toy_bundle

from unidiff_sdk import Catalog, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.retrieval.query import MAX_IMAGINED
from unidiff_sdk.store import Store
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.images import ImageStore

pytestmark = pytest.mark.filterwarnings("ignore:The bundle .toy. was trained")

TEXT = "red boots"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return EdgeStore(tmp_path_factory.mktemp("shop") / "vectors", DIM)


@pytest.fixture(scope="module")
def all_runs() -> list[int]:
    return []


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, store: Store, all_runs: list[int]) -> Iterator[Catalog]:
    colors = np.random.default_rng(0).integers(0, 256, (40, 3))
    folder = tmp_path_factory.mktemp("toy")
    bundle = open_watched(make_toy_bundle(folder / "bundle"), record_unet(all_runs))
    with Catalog.from_parts(store, ImageStore(folder / "images"), bundle) as catalog:
        catalog.add([Image.new("RGB", (16, 16), tuple(map(int, c))) for c in colors], ids=list(range(40)))
        yield catalog


@pytest.fixture
def unet_runs(all_runs: list[int]) -> list[int]:
    """The batch sizes of the UNet's runs in this test."""
    all_runs.clear()
    return all_runs


def record_unet(runs: list[int]) -> Callable[[str, Mapping[str, np.ndarray]], None]:
    def record(graph: str, feeds: Mapping[str, np.ndarray]) -> None:
        if graph == "unet":
            runs.append(len(feeds["sample"]))

    return record


def test_imagine_adds_z_scores_of_generated_images(shop: Catalog, store: Store) -> None:
    """The ranking is that of summed z-scores, each part standardized over all items."""
    images = Generator(shop.bundle).generate(TEXT, n=3, seed=0, steps=4)
    encoder = Encoder(shop.bundle)
    records = [record for batch in store.scroll() for record in batch]
    items, ids = np.array([record.vector for record in records]), [record.payload["id"] for record in records]
    embeddings, text = encoder.encode_images(images), encoder.encode_texts([TEXT])[0]
    agreement = np.exp(10 * embeddings @ text)  # the toy's logit scale
    direction = (agreement / agreement.sum()) @ embeddings
    of_images = items @ (direction / np.linalg.norm(direction))
    of_text = items @ text
    for weight in (0.5, 3.0):
        expected = of_text / of_text.std() + weight * of_images / of_images.std()
        page = shop.search(TEXT, imagine=3, weights={"text": 1, "imagined": weight}, limit=40)
        assert [hit.id for hit in page] == [ids[i] for i in np.argsort(-expected)]
    double = shop.search(TEXT, imagine=3, weights={"text": 2, "imagined": 6}, limit=40)
    assert [hit.id for hit in double] == [hit.id for hit in page]  # only ratios count
    unwanted = {"without": "coat", "limit": 40}
    ignored = shop.search(TEXT, imagine=1, weights={"text": 0, "imagined": 0}, **unwanted)
    assert [hit.id for hit in ignored] == [hit.id for hit in shop.search(TEXT, weights={"text": 0}, **unwanted)]
    alone = shop.search(TEXT, imagine=3, weights={"text": 1, "imagined": 0}, limit=40)
    assert [hit.id for hit in alone] == [hit.id for hit in shop.search(TEXT, limit=40)]


def test_imagine_adds_images_to_a_mix(shop: Catalog) -> None:
    options: dict[str, Any] = {"image": Image.new("RGB", (16, 16), "red"), "without": "coat", "limit": 40}
    plain = [hit.id for hit in shop.search(TEXT, **options)]
    assert [hit.id for hit in shop.search(TEXT, imagine=2, weights={"imagined": 1e-6}, **options)] == plain
    assert [hit.id for hit in shop.search(TEXT, imagine=2, weights={"imagined": 5}, **options)] != plain


def test_imagine_is_deterministic(shop: Catalog) -> None:
    one, two = (shop.search(TEXT, imagine=2, limit=40) for _ in range(2))
    assert [(hit.id, hit.score) for hit in one] == [(hit.id, hit.score) for hit in two]
    assert [hit.id for hit in one] != [hit.id for hit in shop.search(TEXT, limit=40)]


def test_imagine_generates_once_per_search_in_few_steps(shop: Catalog, unet_runs: list[int], tmp_path: Path) -> None:
    first = shop.search(TEXT, imagine=2, limit=15)
    rest = shop.search(TEXT, imagine=2, limit=30, cursor=first.cursor)
    assert unet_runs == [4, 4, 4, 4]  # the four steps of the bundle, for two images with guidance
    assert sorted(hit.id for page in (first, rest) for hit in page) == list(range(40))
    with pytest.raises(OptionError, match="belongs to another search"):
        shop.search(TEXT, imagine=3, limit=15, cursor=first.cursor)
    sampler = {"name": "ddim", "steps": 25, "guidance_scale": 3.0, "prediction_type": "epsilon"}
    slow: list[int] = []
    bundle = open_watched(make_toy_bundle(tmp_path / "bundle", sampler=sampler), record_unet(slow))
    with Catalog(":memory:", bundle) as catalog:
        catalog.add(Image.new("RGB", (16, 16)), ids="a")
        catalog.search(TEXT, imagine=1)
    assert slow == [2] * 6  # not the 25 steps of the bundle


def test_search_batch_generates_for_all_texts_at_once(shop: Catalog, unet_runs: list[int]) -> None:
    queries: list[Any] = [{"text": TEXT, "imagine": 2}, "coat", {"text": "coat", "imagine": 2}]
    pages = shop.search_batch(queries, limit=40)
    assert unet_runs == [8, 8, 8, 8]
    for query, page in zip(queries, pages, strict=True):
        alone = shop.search(**({"text": query} if isinstance(query, str) else query), limit=40)
        scores = {hit.id: hit.score for hit in alone}
        assert [hit.score for hit in page] == pytest.approx([scores[hit.id] for hit in page], abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image": Image.new("RGB", (16, 16)), "imagine": 2}, "imagine=2 generates images from a text: give a text"),
        ({"text": TEXT, "imagine": -1}, f"imagine=-1: give the number of images to generate, 0 to {MAX_IMAGINED}"),
        ({"text": TEXT, "imagine": MAX_IMAGINED + 1}, "imagine=17"),
        ({"text": TEXT, "imagine": True}, "imagine=True"),
        ({"text": TEXT, "imagine": 1.5}, "imagine=1.5"),
        ({"text": TEXT, "imagine": "4"}, "imagine='4'"),
    ],
)
def test_imagine_refuses_invalid_arguments(
    shop: Catalog, unet_runs: list[int], arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(OptionError, match=says):
        shop.search(**arguments)
    assert unet_runs == []
