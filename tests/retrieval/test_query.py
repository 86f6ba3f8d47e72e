"""Mixes of texts, pictures and items: the formula, the modality gap that it bridges, and the real tiny model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk import Catalog, OptionError
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.retrieval.query import WEIGHTS, Gap, Query, mix

DIM = 6


def units(rng: np.random.Generator, n: int) -> np.ndarray:
    rows = rng.normal(size=(n, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------------ the formula


def test_mix_is_the_formula() -> None:
    rng = np.random.default_rng(0)
    items, (text, image, bad), (caption, neutral) = units(rng, 50), units(rng, 3), units(rng, 2)
    weights = WEIGHTS | {"text": 2.0, "image": 1.0, "without": 0.5}
    query = mix({"text": text, "image": image, "without": bad}, weights, Gap(items, caption, neutral))

    nothing = neutral - caption  # a direction, which the rest of a text is at right angles to
    rest = np.eye(DIM) - np.outer(nothing, nothing) / (nothing @ nothing)
    meant = rest @ (text - caption), image, rest @ (bad - caption)
    coefficients = np.array([2, 1, -0.5]) / [np.std(items @ part) for part in meant]
    coefficients /= coefficients[0] + coefficients[1]
    expected = sum(c * part for c, part in zip(coefficients, meant, strict=True))
    np.testing.assert_allclose(query, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ratio=st.sampled_from([0.2, 1.0, 5.0]),
    gap=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    narrow=st.floats(0.2, 1),
)
def test_a_gap_between_texts_and_pictures_does_not_change_the_ranking(
    seed: int, ratio: float, gap: tuple[float, float], narrow: float
) -> None:
    """A modality gap is a vector that all pictures share and one that all texts share, at right angles to what they say
    (Zhang et al. 2023, "Diagnosing and Rectifying Vision Models using Language"); and texts may lie closer together."""
    rng = np.random.default_rng(seed)
    items, (text, image, caption, neutral) = units(rng, 40), units(rng, 4)
    weights = WEIGHTS | {"text": ratio}
    plain = items @ mix({"text": text, "image": image}, weights, Gap(items, caption, neutral))

    def apart(rows: np.ndarray, *shared: float) -> np.ndarray:
        return np.concatenate([rows, np.broadcast_to(np.float32(shared), (*rows.shape[:-1], 2))], axis=-1)

    def as_text(row: np.ndarray) -> np.ndarray:
        return apart(narrow * row, 0.3, gap[1])

    pictures = apart(items, gap[0], 0)
    moved = {"text": as_text(text), "image": apart(image, gap[0], 0)}
    shifted = pictures @ mix(moved, weights, Gap(pictures, as_text(caption), as_text(neutral)))
    scale = np.std(shifted) / np.std(plain)
    np.testing.assert_allclose(shifted - shifted.mean(), scale * (plain - plain.mean()), atol=2e-3)


def test_words_that_say_nothing_are_not_heard() -> None:
    """Whatever they have in common with other texts, and however loud."""
    rng = np.random.default_rng(1)
    items, (image, caption, neutral) = units(rng, 40), units(rng, 3)
    nothing = caption + 0.5 * (neutral - caption)
    query = mix({"text": nothing, "image": image}, WEIGHTS, Gap(items, caption, neutral))
    assert np.corrcoef(items @ query, items @ image)[0, 1] > 0.9999


def test_small_catalogs_are_mixed_by_the_weights_alone() -> None:
    rng = np.random.default_rng(0)
    text, image = units(rng, 2)
    zero = np.zeros(DIM, np.float32)
    for items in (units(rng, 0), units(rng, 1), np.repeat(units(rng, 1), 5, axis=0)):
        query = mix({"text": text, "image": image}, WEIGHTS | {"text": 3.0}, Gap(items, zero, zero))
        np.testing.assert_allclose(query, 0.75 * text + 0.25 * image, atol=1e-6)


def test_only_what_is_not_wanted() -> None:
    rng = np.random.default_rng(0)
    items, (bad, worse) = units(rng, 30), units(rng, 2)
    zero = np.zeros(DIM, np.float32)
    query = mix({"unlike": bad, "without": worse}, WEIGHTS, Gap(items, zero, zero))
    assert np.corrcoef(items @ query, items @ bad)[0, 1] < -0.3
    assert np.corrcoef(items @ query, items @ worse)[0, 1] < -0.3


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "search for something"),
        ({"text": ""}, "text=''"),
        ({"without": ["stripes", 3]}, "without=3"),
        ({"like": []}, "search for something"),
        ({"like": 1.5}, "not an id"),
        ({"unlike": [""]}, "not an id"),
        ({"vector": [0.0] * DIM}, "not all zero"),
        ({"vector": [float("nan")] * DIM}, "finite numbers"),
        ({"vector": [[1.0]]}, "one row"),
        ({"vector": "red"}, "sequence of numbers"),
        ({"text": "x", "weights": {"caption": 1}}, "those are text, imagined, image, like, vector, unlike, without"),
        ({"text": "x", "weights": {"text": -1}}, "not negative"),
        ({"text": "x", "weights": {"text": True}}, "a finite number"),
        ({"text": "x", "weights": {"text": 0}}, "text must weigh more than 0"),
        ({"text": "x", "weights": (1, 2, 3)}, "two numbers"),
        ({"text": "x", "weights": 0.5}, "two numbers"),
    ],
)
def test_refusals(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Query.of(**arguments)


def test_a_digest_tells_queries_apart(tmp_path: Path) -> None:
    picture = render(products("fashion-man", 1, seed=0)[0])
    picture.save(tmp_path / "a.png")
    asked: list[dict[str, Any]] = [
        {"text": "red"},
        {"text": "blue"},
        {"without": "red"},
        {"text": "red", "image": picture},
        {"text": "red", "image": tmp_path / "a.png"},
        {"text": "red", "weights": {"text": 2}},
        {"text": "red", "imagine": 2},
        {"text": "red", "imagine": 3},
        {"like": 7},
        {"like": "7"},
        {"vector": [1.0, 2.0]},
    ]
    digests = [Query.of(**arguments).digest() for arguments in asked]
    assert digests == [Query.of(**arguments).digest() for arguments in asked]
    assert len(set(digests)) == len(asked)


# ------------------------------------------------------------------------------------------------ the tiny model


@pytest.fixture(scope="module")
def shop() -> Iterator[Catalog]:
    """240 synthetic products, of the split that the tiny model was not trained on."""
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


def test_a_color_word_moves_the_ranking_of_a_picture_toward_it(shop: Catalog) -> None:
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
def test_words_beside_a_picture_change_what_they_name(
    shop: Catalog, weights: tuple[float, float], at_least: float
) -> None:
    """A picture that is not in the shop, and words for its type in another color: the first hit has both."""
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


def test_without_turns_away(shop: Catalog) -> None:
    before, after, kept = [], [], []
    for kind in ("dress", "skirt", "coat"):
        for pattern in shop.facets("pattern"):
            plain, without = shop.search(kind, limit=10), shop.search(kind, without=str(pattern), limit=10)
            before.append(share(plain, "pattern", str(pattern)))
            after.append(share(without, "pattern", str(pattern)))
            kept.append(share(without, "type", kind) - share(plain, "type", kind))
    assert np.mean(after) < 0.5 * np.mean(before)
    assert np.mean(kept) > -0.15


def test_unlike_turns_away(shop: Catalog) -> None:
    hit = shop.search("a dress", limit=1)[0]
    unlike = shop.search("a dress", unlike=hit, limit=240)
    assert hit.id not in {other.id for other in unlike}
    before = {other.id: rank for rank, other in enumerate(shop.search("a dress", limit=240))}
    after = {other.id: rank for rank, other in enumerate(unlike)}
    closest = [other.id for other in shop.search(like=hit, limit=10)]
    assert np.mean([after[id] - before[id] for id in closest]) > 5  # those that resemble it fall back


def test_like_is_the_mean_of_its_examples(shop: Catalog) -> None:
    examples = list(shop.browse(where={"type": "coat"}, limit=3))
    found = shop.search(like=[examples[0], examples[1].id, examples[2].id], limit=10)
    vectors = shop.bundle and [Encoder(shop.bundle).encode_images([hit.load_image()])[0] for hit in examples]
    mean = np.mean(vectors, axis=0)
    by_vector = shop.search(vector=mean, limit=13)
    expected = [hit.id for hit in by_vector if hit.id not in {example.id for example in examples}]
    assert [hit.id for hit in found] == expected[:10]
    assert found[0].score == pytest.approx(next(hit.score for hit in by_vector if hit.id == found[0].id), abs=1e-5)
    with pytest.raises(OptionError, match="no item 'nobody'"):
        shop.search(like="nobody")
    with pytest.raises(OptionError, match="has 3 numbers; this catalog's have"):
        shop.search(vector=[1, 2, 3])


def test_one_part_scores_by_the_cosine(shop: Catalog) -> None:
    hit = shop.search("a red dress", limit=1)[0]
    text = Encoder(shop.bundle).encode_texts(["a red dress"])[0]
    image = Encoder(shop.bundle).encode_images([hit.load_image()])[0]
    assert hit.score == pytest.approx(float(text @ image), abs=1e-5)
    assert shop.search(vector=7 * image, limit=1)[0].score == pytest.approx(1, abs=1e-5)
    assert shop.search(without="a red dress", limit=240)[239].score == pytest.approx(-hit.score, abs=1e-5)


def test_long_and_strange_texts(shop: Catalog) -> None:
    """They are cut where the model's context ends, so what comes after that changes nothing."""
    long = "a red dress " * 9000
    assert len(long) > 100_000
    assert [hit.id for hit in shop.search(long)] == [hit.id for hit in shop.search(long[: len(long) // 2])]
    assert len(shop.search(long, hybrid=True)) == 10
    for text in ("größe 💡 ﷽ \u200b", "\x00\x01", "ﷺ" * 50, "'; drop table --"):
        assert len(shop.search(text, limit=5)) == 5
        assert len(shop.search("dress", without=text, hybrid=True, limit=5)) == 5
    with pytest.raises(OptionError, match="not valid Unicode"):
        shop.search("half of a pair: \ud83d")


# ------------------------------------------------------------------------------------------------ the other questions


def test_a_batch_is_its_searches(shop: Catalog) -> None:
    hit = shop.search("boots", limit=1)[0]
    queries: list[Any] = ["a red dress", {"text": "in blue", "image": hit}, {"like": hit, "without": "stripes"}]
    pages = shop.search_batch(queries, limit=4, where={"pattern": {"ne": "dotted"}})
    for query, page in zip(queries, pages, strict=True):
        one = shop.search(
            **({"text": query} if isinstance(query, str) else query), limit=4, where={"pattern": {"ne": "dotted"}}
        )
        assert [other.id for other in page] == [other.id for other in one]
    assert shop.search_batch([]) == []
    for wrong, says in [("red", "a list"), ([{"texts": "red"}], "'texts': it takes text, imagine"), ([3], "made of 3")]:
        with pytest.raises(OptionError, match=says):
            shop.search_batch(wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="'size': it takes limit"):
        shop.search_batch(["red"], size=3)
    with pytest.raises(OptionError, match="go on with search"):
        shop.search_batch(["red"], cursor="x")


def test_hybrid_finds_a_word_that_the_model_does_not_know(shop: Catalog) -> None:
    picture = render(products("fashion-man", 1, seed=9)[0])
    shop.add(picture, "item qx-7719", "odd", {"catalog": "fashion-man"})
    try:
        assert shop.search("QX 7719", hybrid=True, limit=1)[0].id == "odd"
        assert "odd" not in {hit.id for hit in shop.search("QX 7719", limit=10)}
        assert shop.search("qx-7719", hybrid=True, where={"type": "dress"}, limit=3)[0].id != "odd"
    finally:
        shop.delete("odd")


def test_facets(shop: Catalog) -> None:
    everything = list(shop.browse(limit=1000))
    counts = shop.facets("type", where={"pattern": "solid"})
    expected = Counter(hit.payload["type"] for hit in everything if hit.payload["pattern"] == "solid")
    assert counts == dict(expected) and list(counts.values()) == sorted(counts.values(), reverse=True)
    assert list(shop.facets("type", limit=2).values()) == [
        n for _, n in Counter(h.payload["type"] for h in everything).most_common(2)
    ]
    with pytest.warns(UserWarning, match='No item has a column "typ". There are: catalog, colour'):
        assert shop.facets("typ") == {}


def test_column_with_a_dot_in_its_name_is_quoted_wherever_columns_are_named() -> None:
    pictures = [render(product) for product in products("fashion-man", 3, seed=1)]
    rows: list[dict[str, Any]] = [
        {"size.cm": 31, "size.eu": "M", "size": {"cm": 1, "eu": "nested"}},
        {"size.cm": 30, "size.eu": "M"},
        {"size.cm": 32, "size.eu": "L"},
    ]
    with Catalog() as catalog:
        catalog.add(pictures, ids=[0, 1, 2], payloads=[{"catalog": "fashion-man", **row} for row in rows])
        assert catalog.facets('"size.eu"') == {"M": 2, "L": 1} and catalog.facets("size.eu") == {"nested": 1}
        assert catalog.facets('"size.cm"') == {31: 1, 30: 1, 32: 1} and catalog.facets("size.cm") == {1: 1}
        assert [hit.id for hit in catalog.browse(order_by='"size.cm"')] == [1, 0, 2]
        hits = catalog.search("shirt", group_by='"size.eu"')
        assert sorted(hit.payload["size.eu"] for hit in hits) == ["L", "M"]
        assert {hit.id for hit in catalog.search("shirt", where={'"size.cm"': {"gt": 30}})} == {0, 2}


def test_columns_of_every_kind() -> None:
    pictures = [render(product) for product in products("fashion-man", 4, seed=1)]
    rows: list[dict[str, Any]] = [
        {"price": 20, "tags": ["new", "sale"], "day": "2024-05-02", "sale": True, "at": {"lat": 1.0, "lon": 2.0}},
        {"price": 9.5, "tags": ["new"], "day": "2024-05-01T10:00:00", "sale": False, "size": {"cm": 3}},
        {"price": 20, "tags": [], "day": "2024-05-03", "sale": True},
        {},
    ]
    with Catalog() as catalog:
        catalog.add(pictures, ids=[0, 1, 2, 3], payloads=[{"catalog": "fashion-man", **row} for row in rows])
        assert catalog.facets("price") == {20: 2, 9.5: 1}
        assert catalog.facets("tags") == {"new": 2, "sale": 1}
        assert catalog.facets("sale") == {True: 2, False: 1}
        assert catalog.facets("size.cm") == {3: 1}
        assert [hit.id for hit in catalog.browse(order_by="-day")] == [2, 0, 1]
        assert [hit.id for hit in catalog.browse(order_by="price", limit=1)] == [1]
        assert {hit.id for hit in catalog.browse(order_by="-price", limit=2)} == {0, 2}
        assert len(catalog.browse()) == 4 and len(catalog.browse(offset=3)) == 1
        assert [hit.score for hit in catalog.browse(limit=1)] == [1.0]
        for column in ("tags", "at", "sale"):
            with pytest.raises(OptionError, match="only a column of single numbers or dates"):
                catalog.browse(order_by=column)
        with pytest.warns(UserWarning, match='No item has a column "prize"'):
            assert len(catalog.search("red", where={"prize": {"lt": 80}})) == 0
        with pytest.warns(UserWarning, match='No item has a column "size.inch"'):
            assert catalog.count({"size.inch": 3}) == 0
        assert catalog.count({"price": 7}) == 0
        assert catalog.info()["columns"] == {
            "at": "place",
            "catalog": "string",
            "day": "date",
            "id": "number",
            "price": "number",
            "sale": "boolean",
            "size": "object",
            "tags": "string",
        }


@pytest.mark.parametrize(
    ("day", "kind"),
    [
        ("2026-03-01", "date"),
        ("2026-03-01T12:30", "date"),
        ("2026-03-01 12:30:00.5+05:30", "date"),
        ("2026-03-01T12:30:00Z", "date"),
        ("2026-03-01T12:30Z", "string"),
        ("20260301", "string"),
        ("2026-03-01T", "string"),
    ],
)
def test_what_is_called_a_date_is_found_as_one(day: str, kind: str) -> None:
    with Catalog() as catalog:
        catalog.add(Image.new("RGB", (16, 16)), payloads=[{"day": day, "catalog": "fashion-man"}])
        assert catalog.info()["columns"]["day"] == kind
        assert catalog.count({"day": {"gte": "2026-01-01"}}) == (kind == "date")
        assert catalog.facets("day") == {day: 1}


def test_a_column_of_lists_has_no_order() -> None:
    with Catalog() as catalog:
        pictures = [Image.new("RGB", (16, 16), (9, n, n)) for n in range(3)]
        catalog.add(pictures, payloads=[{"n": n, "catalog": "fashion-man"} for n in (3, [1, 5], 2)])
        with pytest.raises(OptionError, match="only a column of single numbers or dates"):
            catalog.browse(order_by="n")


def test_duplicates() -> None:
    chosen = products("fashion-man", 5, seed=1)
    pictures = [render(product) for product in chosen]
    pictures += [pictures[0].resize((200, 200)), pictures[0].transpose(0), pictures[3]]
    with Catalog() as catalog:
        catalog.add(pictures, ids=list("abcdefgh"), payloads=[{"catalog": "fashion-man"}] * 8)
        pair = next(group for group in catalog.duplicates(0.999) if group[0].id in "dh")
        assert {hit.id for hit in pair} == {"d", "h"}
        assert pair[0].score == pytest.approx(1, abs=1e-4)
        assert {"a", "f"} <= {hit.id for hit in catalog.duplicates(0.97)[0]}
        assert catalog.duplicates(0.999, where={"id": ["d", "e"]}) == []
