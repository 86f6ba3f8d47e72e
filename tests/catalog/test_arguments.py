"""Arguments of the public API: numbers of numpy count as numbers, and options without effect are errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from unidiff_sdk import Bundle, Catalog, GenerationOptions, OptionError, SearchOptions, ServerOptions
from unidiff_sdk.datasets.synthetic import products
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.encoder import Encoder

COLORS = ("red", "blue", "lime", "black", "white")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Iterator[Catalog]:
    """Five items with an integer and a float column; the payloads are numbers of numpy."""
    with Catalog(tmp_path_factory.mktemp("shop") / "shop.catalog", toy) as catalog:
        images = [Image.new("RGB", (20, 20), color) for color in COLORS]
        payloads = [{"price": np.float32(n + 0.5), "stock": np.int64(n), "catalog": "fashion-man"} for n in range(5)]
        catalog.add(images, list(COLORS), np.arange(5), payloads)
        yield catalog


INTEGERS = [np.int64, np.uint8, lambda n: np.array(n), int]
FLOATS = [np.float32, np.float64, np.float16, np.longdouble, lambda x: np.array(x, np.float32), float]


@pytest.mark.parametrize("number", INTEGERS)
def test_integers_of_numpy_are_accepted(shop: Catalog, toy: Path, number: Any) -> None:
    assert [hit.id for hit in shop.search("red", limit=number(2), offset=number(1))] == [
        hit.id for hit in shop.search("red", limit=2, offset=1)
    ]
    assert len(shop.search("red", imagine=number(1), limit=2)) == 2
    assert len(shop.browse(order_by="stock", limit=number(2), offset=number(1))) == 2
    assert len(shop.facets("price", limit=number(2))) == 2
    assert shop.count({"stock": {"gte": number(3)}}) == 2 and shop.get(number(3)) is not None
    made = shop.generate("red", n=number(2), seed=number(7), steps=number(1), width=number(16), height=number(16))
    assert [image.seed for image in sorted(made, key=lambda image: image.seed)] == [7, 8]
    assert len(shop.generate("red", steps=1, best_of=number(2))) == 1
    options = GenerationOptions(n=number(1), best_of=number(2), min_score=-1, budget=number(3))
    assert (options.n, options.best_of, options.budget) == (1, 2, 3) and type(options.budget) is int
    server = ServerOptions(timeout=number(3), retries=number(1), shards=number(2), replicas=number(2))
    assert type(server.timeout) is type(server.shards) is int
    assert [product.id for product in products("fashion-man", number(2), number(1))]
    assert Bundle.open(toy, threads=number(1)).dim


@pytest.mark.parametrize("number", FLOATS)
def test_floats_of_numpy_are_accepted(shop: Catalog, number: Any) -> None:
    assert len(shop.search("red", min_score=number(-1))) == 5
    assert len(shop.search("red", diversity=number(0.5), limit=3)) == 3
    assert len(shop.search("red", hybrid=number(0.5), limit=3)) == 3
    assert len(shop.search("red", image=Image.new("RGB", (20, 20)), weights=(number(0.5), number(0.5)))) == 5
    assert len(shop.search("red", unlike=1, weights={"text": number(1), "unlike": number(0.25)})) == 4
    assert shop.duplicates(number(0.99)) == shop.duplicates(0.99)
    assert shop.count({"price": {"lt": number(2)}}) == 2
    made = shop.generate("red", guidance_scale=number(2), guidance_rescale=number(0.5), steps=1)
    assert type(made[0].guidance_scale) is float
    options = GenerationOptions(
        like=Image.new("RGB", (8, 8)), strength=number(0.5), min_score=number(-1), max_similarity=number(1)
    )
    assert type(options.strength) is type(options.min_score) is float


def test_weights_may_be_an_array(shop: Catalog) -> None:
    image = Image.new("RGB", (20, 20))
    as_array = shop.search("red", image=image, weights=np.array([0.3, 0.7]))  # type: ignore[arg-type]
    assert [hit.id for hit in as_array] == [hit.id for hit in shop.search("red", image=image, weights=(0.3, 0.7))]


@pytest.mark.parametrize(
    "options",
    [
        {"limit": True},
        {"limit": 2.0},
        {"limit": np.array([2])},
        {"limit": "2"},
        {"offset": np.float32(1)},
        {"offset": 10**30},
        {"offset": 10**5000},
        {"offset": -(10**5000)},
        {"limit": 10**5000},
        {"min_score": True},
        {"min_score": np.nan},
        {"min_score": "0.5"},
        {"min_score": np.array([0.5, 0.5])},
        {"diversity": np.array([])},
        {"hybrid": "yes"},
        {"hybrid": np.inf},
    ],
)
def test_other_values_of_search_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        SearchOptions(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"n": True},
        {"n": 1.0},
        {"n": np.array([1])},
        {"seed": "7"},
        {"steps": np.float64(4)},
        {"width": 1.5},
        {"seed": 10**5000},
    ],
)
def test_other_values_of_generation_options_are_errors(toy: Path, options: dict[str, Any]) -> None:
    generator = Generator(Bundle.open(toy))
    with pytest.raises(OptionError):
        generator.resolve(GenerationOptions(**options))


# ------------------------------------------------------------------------------------------------ long texts


def test_texts_past_the_token_limit_warn_once_with_their_number(shop: Catalog) -> None:
    long = ["red " * 200, "blue " * 200]
    with pytest.warns(UserWarning, match=r"2 of 3 texts are longer than the \d+ tokens of the encoder") as warned:
        shop.search_batch([*long, "lime"])
    assert len(warned) == 1 and "blue" not in str(warned[0].message), "logs keep no queries"
    with pytest.warns(UserWarning, match="1 of 2 texts are longer"):
        shop.search("red", without=long[1])


def test_longest_text_within_the_limit_does_not_warn(toy: Path) -> None:
    encoder = Encoder(Bundle.open(toy))
    text = "red"
    while not encoder.too_long([f"{text} red"]):
        text += " red"
    assert encoder.too_long([text, "x", f"{text} red"]) == [f"{text} red"]
    whole = Tokenizer.from_file(str(toy / "tokenizer" / "tokenizer.json"))
    whole.no_truncation()
    whole.no_padding()
    lengths = [len(whole.encode(each).ids) for each in (text, f"{text} red")]
    assert lengths[0] <= encoder.bundle.max_tokens < lengths[1]


# ------------------------------------------------------------------------------------------------ without effect


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"text": "red", "weights": (0.5, 0.5)}, "names image, which the query does not have"),
        ({"text": "red", "weights": {"text": 2}}, r"no effect on a query of one part \(text\)"),
        ({"text": "red", "like": 1, "weights": {"without": 2}}, "names without"),
        ({"like": 1, "hybrid": True}, "ranks by the words of a text"),
        ({"without": "red", "hybrid": 0.5}, "ranks by the words of a text"),
        ({"text": "red", "group_by": "brnd"}, r"group_by='brnd': no item has this column\. Columns: .*price"),
        ({"text": "red", "group_by": "price.deep"}, "no item has this column"),
        ({"like": 1, "imagine": 2}, "generates images from a text"),
    ],
)
def test_search_options_without_effect_are_errors(shop: Catalog, query: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        shop.search(**query)


def test_group_by_of_a_rare_column_is_accepted(toy: Path, tmp_path: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        images = [Image.new("RGB", (20, 20), color) for color in COLORS]
        catalog.add(images, list(COLORS), payloads=[{"catalog": "fashion-man"}] * 4 + [{"brand": "Acme"}])
        assert len(catalog.search("red", group_by="brand", limit=2)) == 2
        assert len(catalog.search("red", group_by="nowhere", where={"brand": "none"})) == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 8}, "budget is 8, and no candidate can be rejected"),
        ({"guidance_scale": 1, "guidance_rescale": 0.5}, "guidance_rescale has no effect"),
        ({"guidance_scale": 0, "negative_prompt": "blue"}, "negative_prompt has no effect"),
        ({"strength": 0.5}, "strength applies to an image"),
        ({"mask": Image.new("L", (8, 8))}, "mask applies to an image"),
    ],
)
def test_generation_options_without_effect_are_errors(shop: Catalog, options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        shop.generate("red", **options)


@pytest.mark.parametrize(
    "arguments", [{"images": "i"}, {"api_key": "k"}, {"server": ServerOptions()}, {"collection": "shop"}], ids=str
)
def test_arguments_for_a_server_are_errors_for_a_folder(toy: Path, tmp_path: Path, arguments: dict[str, Any]) -> None:
    (name,) = arguments
    for location in (tmp_path / "shop.catalog", ":memory:"):
        with pytest.raises(OptionError, match=f"{name}: only for a Qdrant server"):
            Catalog(location, toy, **arguments)
    assert not (tmp_path / "shop.catalog").exists()
    with pytest.raises(OptionError, match="grpc_port=7000"):
        ServerOptions(grpc_port=7000)


@pytest.mark.parametrize("location", [None, 5, b"shop", "", "a\0b", ["shop"]], ids=repr)
def test_location_of_another_type_is_an_error(toy: Path, location: Any) -> None:
    with pytest.raises(OptionError, match="Give a folder, ':memory:', or the URL"):
        Catalog(location, toy)


@pytest.mark.parametrize("name", ["callback", "preview"])
def test_callbacks_must_be_callable(shop: Catalog, name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is 3; give a function"):
        shop.generate("red", steps=1, **{name: 3})  # type: ignore[arg-type]
