"""README, quickstarts and examples search for what their data holds, and the first hit is right in every word."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.attributes import named_attributes

from unidiff_sdk import Catalog, Generation, Page
from unidiff_sdk.datasets.synthetic import CATALOGS, products, render

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


# --- what the files ask for ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A synthetic catalog, as `products` and `write_catalog` take it."""

    name: str
    n: int
    split: str = "train"
    seed: int = 0


@dataclass(frozen=True)
class Query:
    """A text query or a prompt of a file, the data that it is asked of, and the literal options of the call."""

    file: str
    text: str
    data: Data
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


def data_of(source: str) -> Data:
    """The data that a script makes: the arguments of its one call of `products` or `write_catalog`."""
    (call,) = [call for call in calls(source) if called(call) in {"products", "write_catalog"}]
    arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return Data(ast.literal_eval(call.args[0]), **arguments)


def queries_of(file: str, source: str, data: Data, *methods: str) -> Iterator[Query]:
    """The calls of `methods` with a text and without an image."""
    for call in calls(source):
        keywords = {keyword.arg or "**": keyword.value for keyword in call.keywords}
        if called(call) in methods and call.args and "image" not in keywords:
            options = {name: ast.literal_eval(value) for name, value in keywords.items()}
            yield Query(file, ast.literal_eval(call.args[0]), data, options)


def shell_queries(file: str, source: str, data: Data, command: str) -> Iterator[Query]:
    """The `unidiff search` or `unidiff generate` lines of a shell script. `unidiff dataset` changes the data."""
    for line in source.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["unidiff"]:
            continue
        options = {name.lstrip("-"): value for name, value in pairwise(words) if name.startswith("-")}
        if words[1] == "dataset":
            data = Data(words[2], int(options["n"]), options["split"])
        elif words[1] == command:
            literal = {name: json.loads(options[name]) for name in ("where", "n", "seed") if name in options}
            yield Query(f"{file}, shell", words[3], data, literal)


def blocks(page: str, language: str) -> str:
    """All fenced blocks of a language of a Markdown page."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def calls(source: str) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]


def called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def load(name: str) -> ModuleType:
    """A script of examples/ as a module."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return __import__(name)
    finally:
        sys.path.remove(str(EXAMPLES))


QUICKSTART = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
demo, pipeline = load("demo"), load("pipeline")
PIPELINE_DATA = Data(pipeline.CATALOG, pipeline.SIZES["test"], "test")
PAGES = ("README.md", "docs/quickstart.md")


def queries(method: str) -> Iterator[Query]:
    """All text queries ("search") or prompts ("generate") but those of the demo, whose data takes long to render."""
    yield from queries_of("quickstart.py", QUICKSTART, data_of(QUICKSTART), method)
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        source = blocks(text, "python")
        yield from queries_of(page, source, data_of(source), method)
        yield from shell_queries(page, blocks(text, "bash"), data_of(source), method)


SEARCHES = [*queries("search"), *(Query("pipeline.py", text, PIPELINE_DATA) for text in pipeline.QUERIES)]
PROMPTS = [
    *queries("generate"),
    *(Query("pipeline.py", text, PIPELINE_DATA, {"n": 5, "seed": 7}) for text in pipeline.PROMPTS),
]


# --- the checks ------------------------------------------------------------------------------------------------------


def every_word(text: str) -> dict[str, str]:
    """The attributes that a text names. Fails for a word that names none: no hit could be right in it."""
    attributes, unknown = named_attributes(text)
    assert attributes and not unknown, f"{text!r} asks for {unknown or 'nothing'}, which no product is known by"
    return attributes


@pytest.fixture(scope="module")
def shop_of() -> Iterator[Callable[[Data], Catalog]]:
    """A function from data to a catalog of it at 64 pixels, as the quickstart and the pipeline make it."""
    with ExitStack() as stack:

        @cache
        def shop(data: Data) -> Catalog:
            catalog = stack.enter_context(Catalog())
            chosen = products(data.name, data.n, data.seed, data.split)
            payloads = [p.attributes | {"price": p.price, "catalog": p.catalog} for p in chosen]
            catalog.add([render(p) for p in chosen], texts=[p.caption for p in chosen], payloads=payloads)
            return catalog

        yield shop


@pytest.mark.parametrize("name", CATALOGS)
def test_the_vocabulary_reads_the_attributes_of_every_caption(name: str) -> None:
    for product in products(name, 300, split="test-unseen"):
        named, _ = named_attributes(product.caption)
        assert named == {column: value for column, value in product.attributes.items() if value != "none"}


def test_a_word_that_names_no_attribute_is_found() -> None:
    assert named_attributes("something warm, in red") == ({"colour": "red"}, {"something", "warm"})


def test_queries_are_found_in_every_file() -> None:
    files = {"quickstart.py", *PAGES, *(f"{page}, shell" for page in PAGES), "pipeline.py"}
    assert {query.file for query in SEARCHES} == {query.file for query in PROMPTS} == files


@pytest.mark.parametrize("query", SEARCHES, ids=str)
def test_the_first_hit_is_right_in_every_word(query: Query, shop_of: Callable[[Data], Catalog]) -> None:
    check_hits(query.text, shop_of(query.data).search(query.text, **query.options), query.options)


@pytest.mark.parametrize("query", PROMPTS, ids=str)
def test_the_best_image_is_right_in_every_word(query: Query) -> None:
    with Catalog() as catalog:
        check_image(query.text, catalog.generate(query.text, **query.options))


def check_hits(text: str, hits: Page, options: Mapping[str, Any]) -> None:
    expected = every_word(text)
    assert {column: hits[0].payload[column] for column in expected} == expected
    for hit in hits:
        assert satisfies(hit.payload, options.get("where", {}))


def satisfies(payload: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a payload passes a filter made of equality, lists, `lt` and `not`: all that the examples use."""
    for column, wanted in where.items():
        if column == "not":
            passes = not satisfies(payload, wanted)
        elif isinstance(wanted, list):
            passes = payload[column] in wanted
        elif isinstance(wanted, dict):
            assert set(wanted) == {"lt"}, f"extend `satisfies` by {set(wanted)}"
            passes = payload[column] < wanted["lt"]
        else:
            passes = payload[column] == wanted
        if not passes:
            return False
    return True


def check_image(text: str, generation: Generation) -> None:
    """The judge, which no model is trained on, reads every named attribute from the best image."""
    pytest.importorskip("torch", reason="the judge needs the train extra")
    from unidiff_sdk.training.evaluation.judge import Judge

    expected = every_word(text)
    read = Judge.load().attributes([generation[0].image])
    assert {column: read[column][0] for column in expected} == expected


# --- the demo, whose 600 products take half a minute to render -------------------------------------------------------


@pytest.fixture(scope="module")
def demo_shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Catalog]:
    with pytest.MonkeyPatch.context() as patch, Catalog() as catalog:
        patch.chdir(tmp_path_factory.mktemp("demo"))
        folders = demo.write_shop(demo.N_EACH)
        assert demo.index(catalog, folders) == 3 * demo.N_EACH
        yield catalog


def query_of(call: Callable[[Catalog], Any]) -> Query:
    source = textwrap.dedent(inspect.getsource(call))
    (query,) = queries_of("demo.py", source, Data("all three", demo.N_EACH, demo.SPLIT), "search", "generate")
    return query


@pytest.mark.slow
@pytest.mark.parametrize("call", [*demo.SEARCHES, *demo.FILTERS])
def test_demo_search_is_right_in_every_word(demo_shop: Catalog, call: Callable[[Catalog], Page]) -> None:
    query = query_of(call)
    check_hits(query.text, call(demo_shop), query.options)


@pytest.mark.slow
def test_demo_image_search_finds_the_product_in_the_photo(demo_shop: Catalog) -> None:
    wanted = demo.photographed().attributes
    hit = demo.search_image(demo_shop)[0]
    assert {column: hit.payload[column] for column in wanted} == wanted
    by_text_too = demo.search_image_and_text(demo_shop)[0].payload
    assert (by_text_too["type"], by_text_too["colour"], by_text_too["pattern"]) == ("skirt", "brown", wanted["pattern"])


@pytest.mark.slow
@pytest.mark.parametrize("call", demo.GENERATIONS)
def test_demo_generates_what_the_shop_does_not_have(demo_shop: Catalog, call: Callable[[Catalog], Generation]) -> None:
    query = query_of(call)
    check_image(query.text, call(demo_shop))
    expected = every_word(query.text)
    same = {column: expected[column] for column in ("type", "colour", "pattern")}
    assert demo_shop.count(same) == 0


@pytest.mark.slow
def test_demo_finds_what_it_kept(demo_shop: Catalog) -> None:
    hits = demo.keep(demo_shop)
    assert [bool(hit.payload.get("generated")) for hit in hits] == [True] * 5 + [False] * 2
