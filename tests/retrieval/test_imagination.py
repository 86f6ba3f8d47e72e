"""Searches that draw what they look for: the mix against its parts made by hand, pages, batches, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.retrieval.imagination import agreed
from unidiff_sdk.retrieval.query import MOST_IMAGINED

pytestmark = pytest.mark.filterwarnings("ignore:The bundle .toy. was trained")

TEXT = "red boots"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    colors = np.random.default_rng(0).integers(0, 256, (40, 3))
    bundle = make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")
    with Catalog(":memory:", bundle) as catalog:
        catalog.add([Image.new("RGB", (16, 16), tuple(map(int, c))) for c in colors], ids=list(range(40)))
        yield catalog


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """What the generator was asked for."""
    calls: list[tuple[tuple[str, ...], dict[str, Any]]] = []
    generate = Generator.generate

    def noted(self: Generator, prompts: Any, **options: Any) -> list[Image.Image]:
        calls.append((tuple(prompts), options))
        return generate(self, prompts, **options)

    monkeypatch.setattr(Generator, "generate", noted)
    return calls


def test_drawn_pictures_are_added_to_what_was_asked(shop: Catalog) -> None:
    """z-scored similarities added up, each part over all items, rank as the search does."""
    pictures = Generator(shop.bundle).generate(TEXT, n=3, seed=0, steps=4)
    encoder = Encoder(shop.bundle)
    items = np.array([record.vector for batch in shop._store.scroll() for record in batch])
    ids = [record.payload["id"] for batch in shop._store.scroll() for record in batch]
    drawn, text = encoder.encode_images(pictures), encoder.encode_texts([TEXT])[0]
    agreement = np.exp(10 * drawn @ text)  # the toy's logit scale
    direction = (agreement / agreement.sum()) @ drawn
    of_pictures = items @ (direction / np.linalg.norm(direction))
    of_text = items @ text
    for weight in (0.5, 3.0):
        expected = of_text / of_text.std() + weight * of_pictures / of_pictures.std()
        page = shop.search(TEXT, imagine=3, weights={"text": 1, "imagined": weight}, limit=40)
        assert [hit.id for hit in page] == [ids[i] for i in np.argsort(-expected)]
    double = shop.search(TEXT, imagine=3, weights={"text": 2, "imagined": 6}, limit=40)
    assert [hit.id for hit in double] == [hit.id for hit in page]  # only ratios count
    alone = shop.search(TEXT, imagine=3, weights={"text": 1, "imagined": 0}, limit=40)
    assert [hit.id for hit in alone] == [hit.id for hit in shop.search(TEXT, limit=40)]


def test_pictures_are_added_to_a_mix(shop: Catalog) -> None:
    options: dict[str, Any] = {"image": Image.new("RGB", (16, 16), "red"), "without": "coat", "limit": 40}
    plain = [hit.id for hit in shop.search(TEXT, **options)]
    assert [hit.id for hit in shop.search(TEXT, imagine=2, weights={"imagined": 1e-6}, **options)] == plain
    assert [hit.id for hit in shop.search(TEXT, imagine=2, weights={"imagined": 5}, **options)] != plain


def test_pictures_that_agree_count_most() -> None:
    text, *pictures = np.eye(4, dtype=np.float32)
    pictures = np.stack([(text + pictures[0]) / 2**0.5, pictures[1], pictures[2]])
    direction = agreed(pictures, text, 20.0)
    assert np.linalg.norm(direction) == pytest.approx(1) and direction @ pictures[0] > 0.999
    plain = pictures.mean(0) / np.linalg.norm(pictures.mean(0))
    np.testing.assert_allclose(agreed(pictures, text, 0.0), plain, rtol=1e-6)
    assert np.isfinite(agreed(pictures, text, 1e4)).all()


def test_the_same_search_draws_the_same(shop: Catalog) -> None:
    one, two = (shop.search(TEXT, imagine=2, limit=40) for _ in range(2))
    assert [(hit.id, hit.score) for hit in one] == [(hit.id, hit.score) for hit in two]
    assert [hit.id for hit in one] != [hit.id for hit in shop.search(TEXT, limit=40)]


def test_few_steps_are_taken_and_a_page_draws_once(shop: Catalog, drawn: list[Any], tmp_path: Path) -> None:
    first = shop.search(TEXT, imagine=2, limit=15)
    rest = shop.search(TEXT, imagine=2, limit=30, cursor=first.cursor)
    assert drawn == [((TEXT,), {"n": 2, "seed": 0, "steps": 4})]  # the bundle's own four
    assert sorted(hit.id for page in (first, rest) for hit in page) == list(range(40))
    with pytest.raises(OptionError, match="belongs to another search"):
        shop.search(TEXT, imagine=3, limit=15, cursor=first.cursor)
    sampler = {"name": "ddim", "steps": 25, "guidance_scale": 3.0, "prediction_type": "epsilon"}
    with Catalog(":memory:", make_toy_bundle(tmp_path / "bundle", sampler=sampler)) as catalog:
        catalog.add(Image.new("RGB", (16, 16)), ids="a")
        catalog.search(TEXT, imagine=1)
    assert drawn[1][1]["steps"] == 6


def test_a_batch_draws_all_its_texts_at_once(shop: Catalog, drawn: list[Any]) -> None:
    queries: list[Any] = [{"text": TEXT, "imagine": 2}, "coat", {"text": "coat", "imagine": 2}]
    pages = shop.search_batch(queries, limit=40)
    assert drawn == [((TEXT, "coat"), {"n": 2, "seed": 0, "steps": 4})]
    for query, page in zip(queries, pages, strict=True):
        alone = shop.search(**({"text": query} if isinstance(query, str) else query), limit=40)
        scores = {hit.id: hit.score for hit in alone}
        assert [hit.score for hit in page] == pytest.approx([scores[hit.id] for hit in page], abs=1e-2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"image": Image.new("RGB", (16, 16)), "imagine": 2}, "imagine= draws what a text asks for: give a text"),
        ({"text": TEXT, "imagine": -1}, f"imagine=-1: .* from 0 to {MOST_IMAGINED}"),
        ({"text": TEXT, "imagine": MOST_IMAGINED + 1}, "imagine=17"),
        ({"text": TEXT, "imagine": True}, "imagine=True"),
        ({"text": TEXT, "imagine": 1.5}, "imagine=1.5"),
        ({"text": TEXT, "imagine": "4"}, "imagine='4'"),
    ],
)
def test_refusals(shop: Catalog, drawn: list[Any], arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        shop.search(**arguments)
    assert drawn == []
