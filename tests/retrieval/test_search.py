"""Searches with the built-in model: mixes, examples, batches and hybrid ranking."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from unidiff_sdk import Catalog, OptionError
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.inference.encoder import Encoder


@pytest.fixture(scope="module")
def shop() -> Iterator[Catalog]:
    """240 synthetic products of a split that the built-in model was not trained on."""
    chosen = products("fashion-woman", 240, seed=4, split="test")
    with Catalog() as catalog:
        catalog.add(
            [render(product) for product in chosen],
            texts=[product.caption for product in chosen],
            ids=[product.id for product in chosen],
            payloads=[{"catalog": product.catalog, **product.attributes} for product in chosen],
        )
        yield catalog


def share(page: Any, column: str, value: str) -> float:
    return float(np.mean([hit.payload[column] == value for hit in page]))


def test_color_word_moves_the_ranking_of_an_image_toward_that_color(shop: Catalog) -> None:
    gained, kept = [], []
    for hit in shop.browse(where={"pattern": "solid"}, limit=12):
        colour, kind = "blue" if hit.payload["colour"] != "blue" else "red", hit.payload["type"]
        alone, both = shop.search(image=hit, limit=11)[1:], shop.search(colour, image=hit, limit=10)
        gained.append(share(both, "colour", colour) - share(alone, "colour", colour))
        kept.append(share(both, "type", kind))
        more = shop.search(colour, image=hit, weights=(0.9, 0.1), limit=10)
        less = shop.search(colour, image=hit, weights=(0.1, 0.9), limit=10)
        assert share(more, "colour", colour) >= share(less, "colour", colour)
    assert np.mean(gained) > 0.3 and min(gained) >= 0
    assert np.mean(kept) > 0.35  # of ten types


@pytest.mark.parametrize(("weights", "at_least"), [((0.7, 0.3), 0.8), ((0.5, 0.5), 0.6)])
def test_text_with_an_image_changes_what_the_text_names(
    shop: Catalog, weights: tuple[float, float], at_least: float
) -> None:
    """An image that is not in the catalog, and a text for its type in another color: the first hit matches both."""
    stock = {(hit.payload["type"], hit.payload["colour"]) for hit in shop.browse(limit=240)}
    rng = np.random.default_rng(0)
    queries: list[dict[str, Any]] = []
    wanted = []
    for product in products("fashion-woman", 80, seed=9, split="test"):
        kind, colour = product.attributes["type"], product.attributes["colour"]
        others = sorted(c for t, c in stock if t == kind and c != colour)
        wanted.append((kind, others[rng.integers(len(others))]))
        queries.append({"text": "a {1} {0}".format(*wanted[-1]), "image": render(product), "weights": weights})
    pages = shop.search_batch(queries, limit=1)
    found = [(page[0].payload["type"], page[0].payload["colour"]) for page in pages]
    assert np.mean([one == pair for one, pair in zip(found, wanted, strict=True)]) >= at_least


def test_without_avoids_a_text(shop: Catalog) -> None:
    before, after, kept = [], [], []
    for kind in ("dress", "skirt", "coat"):
        for pattern in shop.facets("pattern"):
            plain, without = shop.search(kind, limit=10), shop.search(kind, without=str(pattern), limit=10)
            before.append(share(plain, "pattern", str(pattern)))
            after.append(share(without, "pattern", str(pattern)))
            kept.append(share(without, "type", kind) - share(plain, "type", kind))
    assert np.mean(after) < 0.5 * np.mean(before)
    assert np.mean(kept) > -0.15


def test_unlike_avoids_an_item(shop: Catalog) -> None:
    hit = shop.search("a dress", limit=1)[0]
    unlike = shop.search("a dress", unlike=hit, limit=240)
    assert hit.id not in {other.id for other in unlike}
    before = {other.id: rank for rank, other in enumerate(shop.search("a dress", limit=240))}
    after = {other.id: rank for rank, other in enumerate(unlike)}
    closest = [other.id for other in shop.search(like=hit, limit=10)]
    assert np.mean([after[id] - before[id] for id in closest]) > 5  # similar items are ranked lower


def test_like_searches_with_the_mean_of_its_examples(shop: Catalog) -> None:
    examples = list(shop.browse(where={"type": "coat"}, limit=3))
    found = shop.search(like=[examples[0], examples[1].id, examples[2].id], limit=10)
    vectors = shop.bundle and [Encoder(shop.bundle).encode_images([hit.load_image()])[0] for hit in examples]
    mean = np.mean(vectors, axis=0)
    by_vector = shop.search(vector=mean, limit=13)
    expected = [hit.id for hit in by_vector if hit.id not in {example.id for example in examples}]
    assert [hit.id for hit in found] == expected[:10]
    assert found[0].score == pytest.approx(next(hit.score for hit in by_vector if hit.id == found[0].id), abs=1e-5)
    with pytest.raises(OptionError, match="this catalog has no item 'nobody'"):
        shop.search(like="nobody")
    with pytest.raises(OptionError, match="vector= has 3 dimensions: give 128"):
        shop.search(vector=[1, 2, 3])


def test_query_of_one_part_scores_by_cosine(shop: Catalog) -> None:
    hit = shop.search("a red dress", limit=1)[0]
    text = Encoder(shop.bundle).encode_texts(["a red dress"])[0]
    image = Encoder(shop.bundle).encode_images([hit.load_image()])[0]
    assert hit.score == pytest.approx(float(text @ image), abs=1e-5)
    assert shop.search(vector=7 * image, limit=1)[0].score == pytest.approx(1, abs=1e-5)
    assert shop.search(without="a red dress", limit=240)[239].score == pytest.approx(-hit.score, abs=1e-5)


def test_long_and_unusual_texts(shop: Catalog) -> None:
    """Texts are truncated at the model's context length, so what follows has no effect."""
    long = "a red dress " * 9000
    assert len(long) > 100_000
    assert [hit.id for hit in shop.search(long)] == [hit.id for hit in shop.search(long[: len(long) // 2])]
    assert len(shop.search(long, hybrid=True)) == 10
    for text in ("größe 💡 ﷽ \u200b", "\x00\x01", "ﷺ" * 50, "'; drop table --"):
        assert len(shop.search(text, limit=5)) == 5
        assert len(shop.search("dress", without=text, hybrid=True, limit=5)) == 5
    with pytest.raises(OptionError, match="not valid Unicode"):
        shop.search("half of a pair: \ud83d")


def test_search_batch_equals_single_searches(shop: Catalog) -> None:
    hit = shop.search("boots", limit=1)[0]
    queries: list[Any] = ["a red dress", {"text": "in blue", "image": hit}, {"like": hit, "without": "stripes"}]
    pages = shop.search_batch(queries, limit=4, where={"pattern": {"ne": "dotted"}})
    for query, page in zip(queries, pages, strict=True):
        one = shop.search(
            **({"text": query} if isinstance(query, str) else query), limit=4, where={"pattern": {"ne": "dotted"}}
        )
        assert [other.id for other in page] == [other.id for other in one]
    assert shop.search_batch([]) == []
    for wrong, says in [
        ("red", "queries is 'red': give a list of queries"),
        ([{"texts": "red"}], "a query has no argument 'texts'. Arguments: text, imagine"),
        ([3], "a query is 3: give a dictionary with keys from text, imagine"),
    ]:
        with pytest.raises(OptionError, match=says):
            shop.search_batch(wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"search_batch has no argument 'size'\. Arguments: limit"):
        shop.search_batch(["red"], size=3)
    with pytest.raises(OptionError, match="get its next page with search"):
        shop.search_batch(["red"], cursor="x")


def test_hybrid_finds_a_word_unknown_to_the_model(shop: Catalog) -> None:
    image = render(products("fashion-man", 1, seed=9)[0])
    shop.add(image, "item qx-7719", "odd", {"catalog": "fashion-man"})
    try:
        assert shop.search("QX 7719", hybrid=True, limit=1)[0].id == "odd"
        assert "odd" not in {hit.id for hit in shop.search("QX 7719", limit=10)}
        assert shop.search("qx-7719", hybrid=True, where={"type": "dress"}, limit=3)[0].id != "odd"
    finally:
        shop.delete("odd")
