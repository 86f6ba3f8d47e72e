"""`make demo`: draw a shop of 300 synthetic products, index it, search it, draw new products, show all on one page.

Only the public API of `unidiff_sdk` is used, and nothing here needs PyTorch.
"""

from __future__ import annotations

import inspect
import os
import platform
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import click
from _page import Card, Page, Row, Section, drawn_card, hit_card
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unidiff_sdk import Catalog, Generation
from unidiff_sdk import Page as Hits
from unidiff_sdk.datasets.synthetic import CATALOGS, products, render, write_catalog

N_EACH = 100
PICTURE = 128  # pixels; the model looks at 64 and draws 64
REPEATS = 20

console = Console()
timings: dict[str, str] = {}


# Each function below is one row of the page, which shows its body as the code that made the row. ------------------


def words_dress(catalog: Catalog) -> Hits:
    return catalog.search("red striped dress", limit=7)


def words_teapot(catalog: Catalog) -> Hits:
    return catalog.search("a tall blue teapot with white dots", limit=7)


def words_synonyms(catalog: Catalog) -> Hits:
    return catalog.search("crimson hooded sweatshirt, plaid", limit=7)


def picture(catalog: Catalog) -> Hits:
    return catalog.search(image="demo/photo.png", limit=6)


def composed(catalog: Catalog) -> Hits:
    return catalog.search("a green handbag", image="demo/photo.png", weights=(0.7, 0.3), limit=6)


def filtered(catalog: Catalog) -> Hits:
    return catalog.search(
        "striped", where={"price": {"lt": 60}, "catalog": "fashion-man", "colour": ["blue", "teal"]}, limit=7
    )


def filtered_not(catalog: Catalog) -> Hits:
    return catalog.search(
        "something warm to wear", where={"type": ["coat", "jacket", "sweater"], "not": {"pattern": "solid"}}, limit=7
    )


def draw_boots(catalog: Catalog) -> Generation:
    return catalog.generate("purple dotted boots", n=5, seed=7)


def draw_chair(catalog: Catalog) -> Generation:
    return catalog.generate("a tall yellow chair with black checks", n=5, seed=1)


def draw_hoodie(catalog: Catalog) -> Generation:
    return catalog.generate("teal hoodie, long loose, with white stripes", n=5, seed=3)


def draw_quick(catalog: Catalog) -> Generation:
    return catalog.generate("a red mug in one colour", n=5, seed=5, steps=8, sampler="dpm++2m")


def keep(catalog: Catalog) -> Hits:
    pictures = catalog.generate("purple dotted boots", n=5, seed=7)
    catalog.add(pictures)
    return catalog.search("purple dotted boots", limit=7)


# ------------------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--n", default=N_EACH, show_default=True, help="Products of each of the three catalogs.")
def main(n: int) -> None:
    """Index, search and generate in a folder demo/, and write demo/index.html."""
    console.rule("[bold]UniDiff SDK: one model that searches a shop and draws for it")
    out = Path("demo")
    folders = draw_shop(out, n)
    with timed("open an empty catalog with the built-in model"):
        catalog = Catalog(out / "shop.catalog")
    with catalog:
        items = index(catalog, folders)
        sections = [*searches(catalog), *drawings(catalog)]
        measure(catalog)
        facts = catalog.info()["bundle"]
        sampler = catalog.bundle.manifest["sampler"]
    page = the_page(sections, items, f"{facts['name']}, {facts['dim']} dimensions, {sampler['name']}")
    written = page.write(out / "index.html")
    show_timings()
    console.print(f"\nThe gallery is [bold]{written}[/] ({written.stat().st_size / 1e6:.1f} MB, opens in any browser).")


def draw_shop(out: Path, n: int) -> list[Path]:
    """Write the three synthetic catalogs afresh, and a picture of a product that is in none of them."""
    for old in (*(out / name for name in CATALOGS), out / "shop.catalog"):
        shutil.rmtree(old, ignore_errors=True)
    with timed(f"draw {3 * n} products ({PICTURE} px)"):
        folders = [
            write_catalog(name, out / name, n=n, split="test", size=PICTURE)
            for name in track(CATALOGS, "Drawing  ", console=console)
        ]
    photo = next(p for p in products("fashion-woman", 500, seed=9, split="test") if is_query(p.attributes))
    render(photo, 2 * PICTURE).save(out / "photo.png")
    return folders


def is_query(attributes: dict[str, str]) -> bool:
    return (attributes["type"], attributes["colour"], attributes["pattern"]) == ("handbag", "red", "striped")


def index(catalog: Catalog, folders: list[Path]) -> int:
    started = time.perf_counter()
    for folder in folders:
        report = catalog.add_folder(folder, progress=True)
        if report.failed:
            sys.exit(f"{folder}: {report.failed[0]}")
    seconds, items = time.perf_counter() - started, catalog.count()
    timings[f"index {items} products"] = f"{seconds:.2f} s  ({items / seconds:,.0f} a second)"
    return items


def searches(catalog: Catalog) -> list[Section]:
    """The search sections; the first search alone pays for loading the text encoder."""
    with timed("first search (loads the text encoder)"):
        catalog.search("a first search")
    photo = Card(Image.open("demo/photo.png"), "the query: a picture that is not in the shop", "photo.png", query=True)
    return [
        Section(
            "Search by words",
            "A sentence and a picture meet in one space. Nobody tagged these products for the search: the figure over "
            "each caption is the cosine between the words and the picture alone.",
            [row(catalog, act) for act in (words_dress, words_teapot, words_synonyms)],
        ),
        Section(
            "Search by picture",
            "Any picture will do: a file, bytes, an array, a hit of another search.",
            [row(catalog, picture, photo)],
        ),
        Section(
            "Search by picture and words",
            "“Like this one, but green.” The two are mixed with weights.",
            [row(catalog, composed, photo)],
        ),
        Section(
            "Filter by any column",
            "Price, brand, type: every column beside the caption filters, inside the engine.",
            [row(catalog, act) for act in (filtered, filtered_not)],
        ),
    ]


def drawings(catalog: Catalog) -> list[Section]:
    with timed("first picture (loads the UNet and the decoder)"):
        catalog.generate("a first picture", seed=0)
    generated = [row(catalog, act) for act in (draw_boots, draw_chair, draw_hoodie, draw_quick)]
    return [
        Section(
            "Generate what is not in the shop yet",
            "The other half of the same model draws from a sentence, 64 × 64 pixels in this tiny version. The search "
            "half ranks what came out by how well it agrees with the words, and finds the nearest product of the shop.",
            generated,
        ),
        Section(
            "Keep what you like",
            "A generated picture goes into the catalog like any other, marked as generated, and is found "
            "like any other.",
            [row(catalog, keep)],
        ),
    ]


def row(catalog: Catalog, act: Callable[[Catalog], Hits | Generation], query: Card | None = None) -> Row:
    result = act(catalog)
    if isinstance(result, Generation):
        cards = [drawn_card(picture) for picture in result]
        took = f"{result.took_ms / 1000:.2f} s for {len(result)}"
    else:
        cards = [hit_card(hit) for hit in result]
        took = f"{len(result)} hits in {result.took_ms:.1f} ms"
    console.print(f"[dim]{took:>20}[/]  {' '.join(code_of(act).split())}", highlight=False, soft_wrap=True)
    return Row(code_of(act), [query, *cards] if query else cards, took, large=isinstance(result, Generation))


def code_of(act: Callable[..., object]) -> str:
    body = textwrap.dedent(inspect.getsource(act).split("\n", 1)[1])
    return body.replace("return ", "", 1).strip()


def measure(catalog: Catalog) -> None:
    """Medians over repeated calls, everything loaded."""
    words = ["red dress", "blue mug", "striped hoodie", "a green lamp"] * (REPEATS // 4)
    cases: dict[str, Callable[[str], Hits]] = {
        "search by words": lambda text: catalog.search(text),
        "search by words with a filter": lambda text: catalog.search(text, where={"price": {"lt": 60}}),
        "search by picture (decode, encode, search)": lambda text: catalog.search(image="demo/photo.png"),
    }
    for name, search in cases.items():
        timings[name] = f"{statistics.median(search(text).took_ms for text in words):.1f} ms  (median of {REPEATS})"
    steps = catalog.bundle.manifest["sampler"]["steps"]
    for count in (1, 8):
        took = statistics.median(catalog.generate("a blue vase", n=count, seed=0).took_ms for _ in range(3)) / 1000
        timings[f"generate {count} picture{'s' * (count > 1)}, {steps} steps"] = f"{took:.2f} s  (median of 3)"


@contextmanager
def timed(name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings[name] = f"{time.perf_counter() - started:.2f} s"


def show_timings() -> None:
    table = Table("", "here", title=f"\nTimings on {machine()}", title_justify="left", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, value in timings.items():
        table.add_row(name, value)
    console.print(table)


def machine() -> str:
    return f"{processor()}, {len(os.sched_getaffinity(0))} cores"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def the_page(sections: list[Section], items: int, model: str) -> Page:
    def first(prefix: str) -> str:
        return next(value for name, value in timings.items() if name.startswith(prefix)).split("  ")[0]

    if "torch" in sys.modules:
        raise AssertionError("the runtime must not import torch")
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("unidiff-sdk", "onnxruntime", "qdrant-edge-py", "numpy")
    )
    return Page(
        title="One model that searches a shop and draws for it",
        text=f"{items} products were indexed, searched by words and by picture, and added to with newly drawn ones: "
        "all by one small jointly trained model, on the CPU, with ONNX Runtime and Qdrant Edge in one Python process, "
        "and no PyTorch.",
        note="Every product here is synthetic: a rendered drawing with an invented brand and price. The built-in model "
        "knows these drawings and nothing else; your own pictures take a fine-tuned bundle.",
        figures=[
            (f"{items}", "products indexed"),
            (first("index"), "to index them"),
            (first("search by words"), "a search by words"),
            (first("search by picture"), "a search by picture"),
            (first("generate 1"), "a new picture"),
            ("none", "PyTorch in the process"),
        ],
        sections=[
            *sections,
            Section(
                "What it took here",
                f"Measured by this run on {machine()}.",
                table=[("", "here"), *timings.items()],
            ),
        ],
        footer=[f"Built-in model: {model}. {versions}; Python {platform.python_version()}.", "Made by `make demo`."],
    )


if __name__ == "__main__":
    main()
