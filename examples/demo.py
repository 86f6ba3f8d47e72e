"""`make demo`: render 600 synthetic products, index and search them, generate new ones, and show it all on one page.

The products come from the split "test-unseen": their combinations of type, color and pattern were in no data that the
built-in model was trained on. Only the public API of `unidiff_sdk` does the work, and nothing here needs PyTorch.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import click
from _page import Card, CardRow, Page, Section, generated_card, hit_card
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from unidiff_sdk import Catalog, Generation
from unidiff_sdk import Page as Hits
from unidiff_sdk.datasets.synthetic import CATALOGS, Product, products, render, write_catalog

OUT = Path("demo")
SPLIT = "test-unseen"
N_EACH = 200
SIZE = 128  # pixels of a product; the built-in model encodes and generates 64
PHOTO_SEED = 10  # another random stream than the shop's, so that the query image is not one of its products
TEXTS = 200  # distinct texts that the search is timed with

console = Console()
timings: dict[str, str] = {}


# Each function below is one row of the page. The row shows the function's body and the result. ----------------------


def search_text(catalog: Catalog) -> Hits:
    return catalog.search("red striped dress", limit=7)


def search_details(catalog: Catalog) -> Hits:
    return catalog.search("a tall wide yellow lamp with navy dots", limit=7)


def search_synonyms(catalog: Catalog) -> Hits:
    return catalog.search("turquoise rucksack without pattern", limit=7)


def search_image(catalog: Catalog) -> Hits:
    return catalog.search(image="demo/photo.png", limit=6)


def search_image_and_text(catalog: Catalog) -> Hits:
    return catalog.search("a brown skirt", image="demo/photo.png", weights=(0.7, 0.3), limit=6)


def filter_price(catalog: Catalog) -> Hits:
    return catalog.search(
        "striped", where={"price": {"lt": 60}, "catalog": "fashion-man", "colour": ["blue", "green"]}, limit=7
    )


def filter_not(catalog: Catalog) -> Hits:
    return catalog.search("boots", where={"price": {"lt": 120}, "not": {"colour": ["red", "black"]}}, limit=7)


def generate_boots(catalog: Catalog) -> Generation:
    return catalog.generate("purple dotted boots", n=5, seed=7)


def generate_chair(catalog: Catalog) -> Generation:
    return catalog.generate("a tall yellow chair with black checks", n=5, seed=1)


def generate_hoodie(catalog: Catalog) -> Generation:
    return catalog.generate("teal hoodie, long loose, with white stripes", n=5, seed=3)


def generate_in_eight_steps(catalog: Catalog) -> Generation:
    return catalog.generate("a plain purple mug", n=5, seed=5, steps=8, sampler="dpm++2m")


def keep(catalog: Catalog) -> Hits:
    boots = catalog.generate("purple dotted boots", n=5, seed=7)
    catalog.add(boots)
    return catalog.search("purple dotted boots", limit=7)


SEARCHES = (search_text, search_details, search_synonyms)
FILTERS = (filter_price, filter_not)
GENERATIONS = (generate_boots, generate_chair, generate_hoodie, generate_in_eight_steps)

# --------------------------------------------------------------------------------------------------------------------


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--n", default=N_EACH, show_default=True, help="Products of each of the three synthetic catalogs.")
def main(n: int) -> None:
    """Index, search and generate in the folder demo/, and write demo/index.html."""
    console.rule("[bold]UniDiff SDK: search a product catalog and generate for it with one model")
    with timed(f"render {3 * n} products at {SIZE} px"):
        folders = write_shop(n)
    with timed("open an empty catalog with the built-in model"):
        catalog = Catalog(OUT / "shop.catalog")
    with catalog:
        items = index(catalog, folders)
        sections = [*search_sections(catalog), *generation_sections(catalog)]
        measure(catalog)
        bundle = catalog.info()["bundle"]
        sampler = catalog.bundle.sampler
    page = demo_page(sections, items, f"{bundle['name']}, {bundle['dim']} dimensions, sampler {sampler.name}")
    written = page.write(OUT / "index.html")
    show_timings()
    size = written.stat().st_size / 1e6
    console.print(f"\nOpen [bold]{written}[/] in a browser ({size:.1f} MB, nothing else needed).")


def write_shop(n: int) -> list[Path]:
    """Write the three synthetic catalogs anew, and the image of a product that none of them holds."""
    for old in (*(OUT / name for name in CATALOGS), OUT / "shop.catalog"):
        shutil.rmtree(old, ignore_errors=True)
    folders = [
        write_catalog(name, OUT / name, n=n, split=SPLIT, size=SIZE)
        for name in track(CATALOGS, "Rendering", console=console)
    ]
    render(photographed(), 2 * SIZE).save(OUT / "photo.png")
    return folders


def photographed() -> Product:
    """The product of the query image: a purple skirt with white dots, from another random stream than the shop."""
    wanted = {"type": "skirt", "colour": "purple", "pattern": "dotted", "colour2": "white"}
    return next(p for p in products("fashion-woman", 500, PHOTO_SEED, SPLIT) if wanted.items() <= p.attributes.items())


def index(catalog: Catalog, folders: Iterable[Path]) -> int:
    """Add the folders and return how many items the catalog then holds."""
    started = time.perf_counter()
    for folder in folders:
        report = catalog.add_folder(folder, progress=True)
        if report.failed:
            sys.exit(f"{folder}: {report.failed[0]}")
    seconds, items = time.perf_counter() - started, catalog.count()
    timings[f"index {items} products"] = f"{seconds:.2f} s  ({items / seconds:,.0f} per second)"
    return items


def search_sections(catalog: Catalog) -> list[Section]:
    """The sections of searches. One search before them loads the text encoder."""
    with timed("first search (loads the text encoder)"):
        catalog.search("a first search")
    photo = Card(Image.open(OUT / "photo.png"), "the query: an image that is not in the shop", "photo.png", query=True)
    return [
        Section(
            "Search by text",
            "The model maps texts and images to one space. Each card shows the cosine between the query and the image "
            "(left) and the price. Captions and columns take no part in these searches.",
            [row(catalog, call) for call in SEARCHES],
        ),
        Section(
            "Search by image",
            "The query can be a file, bytes, an array or a hit of another search.",
            [row(catalog, search_image, photo)],
        ),
        Section(
            "Search by image and text",
            "“Like this one, but brown”: the weights set how much the text and the image count. The first such search "
            "also samples captions of the catalog, to remove what all of them share.",
            [row(catalog, search_image_and_text, photo)],
        ),
        Section(
            "Filter by any column",
            "The engine filters while it searches: by price, brand, type or any other column. The first filter on a "
            "column also builds an index of it.",
            [row(catalog, call) for call in FILTERS],
        ),
    ]


def generation_sections(catalog: Catalog) -> list[Section]:
    """The sections of generated images. One generation before them loads the UNet and the VAE decoder."""
    with timed("first image (loads the UNet and the VAE decoder)"):
        catalog.generate("a first image", seed=0)
    return [
        Section(
            "Generate what the shop does not have",
            "The generator of the same model makes images of 64 × 64 pixels from a prompt. The encoder sorts them by "
            "cosine to the prompt, and finds the nearest product of the shop.",
            [row(catalog, call) for call in GENERATIONS],
        ),
        Section(
            "Keep what you like",
            "Generated images can be added to the catalog. They are marked as generated, and found like any other.",
            [row(catalog, keep)],
        ),
    ]


def row(catalog: Catalog, call: Callable[[Catalog], Hits | Generation], query: Card | None = None) -> CardRow:
    """Run one of the functions above and show its code, its duration and its result."""
    result = call(catalog)
    if isinstance(result, Generation):
        cards = [generated_card(generated) for generated in result]
        took = f"{len(result)} images in {result.took_ms / 1000:.2f} s"
    else:
        cards = [hit_card(hit) for hit in result]
        took = f"{len(result)} hits in {result.took_ms:.1f} ms"
    code = body_of(call)
    console.print(f"[dim]{took:>20}[/]  {' '.join(code.split())}", highlight=False, soft_wrap=True)
    return CardRow(code, [query, *cards] if query else cards, took, large=isinstance(result, Generation))


def body_of(function: Callable[..., object]) -> str:
    """The body of a function whose signature takes one line, without its `return`."""
    body = textwrap.dedent(inspect.getsource(function).split("\n", 1)[1])
    return body.replace("return ", "", 1).strip()


def measure(catalog: Catalog) -> None:
    """Medians over many calls, with everything loaded."""
    texts = distinct_texts(2 * TEXTS)
    first, second = texts[:TEXTS], texts[TEXTS:]

    def median(calls: Iterable[Hits | Generation]) -> float:
        return statistics.median(result.took_ms for result in calls)

    new = median(catalog.search(text) for text in first)
    timings["search by a new text"] = f"{new:.1f} ms  (median of {TEXTS} distinct texts)"
    filtered = median(catalog.search(text, where={"price": {"lt": 60}}) for text in second)
    timings["search by a new text, with a filter"] = f"{filtered:.1f} ms  (median of {TEXTS} distinct texts)"
    again = median(catalog.search(text) for text in first)
    timings["search by a text again (its embedding is cached)"] = f"{again:.1f} ms  (median of {TEXTS})"
    image = median(catalog.search(image=OUT / "photo.png") for _ in range(20))
    timings["search by image (decode, encode, search)"] = f"{image:.1f} ms  (median of 20)"
    steps = catalog.bundle.sampler.steps
    for n in (1, 8):
        took = median(catalog.generate("a blue vase", n=n, seed=0) for _ in range(3)) / 1000
        timings[f"generate {n} image{'s' * (n > 1)}, {steps} steps"] = f"{took:.2f} s  (median of 3)"


def distinct_texts(n: int) -> list[str]:
    """The first `n` different captions of products that are not in the shop."""
    captions = (p.caption for p in products("fashion-man", 2 * n, PHOTO_SEED, SPLIT))
    return list(dict.fromkeys(captions))[:n]


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
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def demo_page(sections: list[Section], items: int, model: str) -> Page:
    """The page of all rows and timings."""

    def value(name: str) -> str:
        return timings[name].split("  ")[0]

    if "torch" in sys.modules:
        raise AssertionError("the runtime must not import torch")
    steps = next(name for name in timings if name.startswith("generate 1"))
    packages = ("unidiff-sdk", "onnxruntime", "qdrant-edge-py", "numpy")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return Page(
        title="Search a product catalog and generate for it with one model",
        text=f"This run indexed {items} products, searched them by text and by image, and added newly generated ones. "
        "One small jointly trained model did it all, on the CPU, with ONNX Runtime and Qdrant Edge in one Python "
        "process, and without PyTorch.",
        note="Every product here is synthetic: a rendered drawing with an invented brand and price. The shop holds "
        "only combinations of type, color and pattern that the training of the built-in model left out, such as red "
        "striped dresses. The model is made for these drawings; your own images need a fine-tuned bundle.",
        figures=[
            (f"{items}", "products indexed"),
            (value(f"index {items} products"), "to index them"),
            (value("search by a new text"), "a search by a new text"),
            (value("search by image (decode, encode, search)"), "a search by image"),
            (value(steps), "a new image"),
            ("none", "PyTorch in the process"),
        ],
        sections=[
            *sections,
            Section("Timings", f"Measured by this run on {machine()}.", table=[("", "here"), *timings.items()]),
        ],
        footer=[
            f"Built-in model: {model}. {versions}; Python {platform.python_version()}.",
            "Written by examples/demo.py (make demo).",
        ],
    )


if __name__ == "__main__":
    main()
