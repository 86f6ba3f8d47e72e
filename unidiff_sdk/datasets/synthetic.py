"""Three synthetic catalogs: rendered products with exact attributes, captions in varied wording, brand and price.

They mirror the kinds of data that UniDiff is about (men's and women's fashion, general goods) and are *synthetic*: no
photograph and no real brand is in them. Every product follows from (catalog, split, seed, index) alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from unidiff_sdk.errors import DataError, OptionError

from .drawing import BACKGROUNDS, COLORS, Pose, paint

SPLITS = ("train", "val", "test", "test-unseen")
SIZES = (64, 512)
MAIN_COLORS = tuple(COLORS)[:10]
SECOND_COLORS = ("white", "black", "yellow", "navy", "pink")
PATTERNS = ("solid", "striped", "diagonal", "checked", "dotted")

TYPES: dict[str, dict[str, float]] = {  # each type's usual price
    "fashion-man": {
        "t-shirt": 20, "shirt": 45, "sweater": 60, "hoodie": 55, "jacket": 120, "vest": 50, "trousers": 70,
        "shorts": 30,
    },
    "fashion-woman": {
        "dress": 80, "skirt": 45, "blouse": 50, "tank top": 18, "coat": 150, "jumpsuit": 90, "boots": 110,
        "handbag": 95,
    },
    "ecommerce-product": {
        "mug": 12, "bottle": 22, "vase": 35, "lamp": 65, "backpack": 75, "chair": 130, "cushion": 25, "teapot": 40,
    },
}  # fmt: skip
CATALOGS = tuple(TYPES)

_BRANDS = {
    "fashion-man": ("Northfold", "Tarn & Co", "Halden", "Briar Lane", "Osprey Row", "Kestrel"),
    "fashion-woman": ("Lumière Nine", "Maren", "Ottilie", "Sable & Fern", "Petra K", "Vellum"),
    "ecommerce-product": ("Hearthly", "Oakmoor", "Plain Goods", "Kilnworks", "Dovetail", "Ambit"),
}
# How a caption calls the two cuts; the columns bear the same names.
_CUTS: dict[str, dict[str, tuple[str, str]]] = {
    "fashion-man": {"length": ("short", "long"), "fit": ("slim", "loose")},
    "fashion-woman": {"length": ("short", "long"), "fit": ("slim", "loose")},
    "ecommerce-product": {"height": ("low", "tall"), "width": ("slim", "wide")},
}
ATTRIBUTES: dict[str, dict[str, tuple[str, ...]]] = {
    name: {
        "type": tuple(TYPES[name]),
        "colour": MAIN_COLORS,
        "colour2": ("none", *SECOND_COLORS),
        "pattern": PATTERNS,
    }
    | _CUTS[name]
    for name in CATALOGS
}
"""What a caption tells, per catalog: column name -> the values that it takes. Two products are the same in meaning,
and relevant to one another's captions, when they are equal in all of these."""

_SYNONYMS = {
    "t-shirt": ("t-shirt", "tee"),
    "shirt": ("shirt", "button-up shirt"),
    "sweater": ("sweater", "pullover", "jumper"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "jacket": ("jacket", "open jacket"),
    "vest": ("vest", "waistcoat"),
    "trousers": ("trousers", "pants"),
    "shorts": ("shorts", "pair of shorts"),
    "dress": ("dress", "gown"),
    "blouse": ("blouse", "blouse with a bow"),
    "tank top": ("tank top", "strap top"),
    "coat": ("coat", "belted coat"),
    "jumpsuit": ("jumpsuit", "overall"),
    "boots": ("boots", "pair of boots"),
    "handbag": ("handbag", "purse"),
    "mug": ("mug", "cup"),
    "lamp": ("lamp", "table lamp"),
    "backpack": ("backpack", "rucksack"),
    "cushion": ("cushion", "pillow"),
    "red": ("red", "crimson"),
    "purple": ("purple", "violet"),
    "teal": ("teal", "turquoise"),
    "short": ("short", "cropped"),
    "slim": ("slim", "narrow"),
    "loose": ("loose", "oversized"),
    "low": ("low", "short"),
    "solid": ("plain", "solid"),
    "striped": ("striped", "banded"),
    "checked": ("checked", "plaid"),
    "dotted": ("dotted", "polka dot", "spotted"),
    "diagonal": ("diagonally striped", "bias striped"),
}
_NOUNS = {
    "striped": "stripes",
    "diagonal": "diagonal stripes",
    "checked": "checks",
    "dotted": "dots",
}
# {cuts} is "long slim", {cloth} "striped" or "plain", {second} "with white stripes" or "in one color", {tail} "with
# white" or nothing.
_WORDINGS = (
    "a {cuts} {colour} {type} {second}",
    "{colour} {type}, {cuts}, {second}",
    "a photo of a {cuts} {cloth} {colour} {type} {tail}",
    "{cuts} {type} in {colour} {second}",
    "product picture: {colour} {cloth} {type} {tail}, {cuts}",
    "{type}, {colour} and {cuts}, {second}",
    "this {type} is {colour}, {cuts}, {second}",
    "new in: {cuts} {colour} {cloth} {type} {tail}",
    "buy a {colour} {type} {second} in a {cuts} cut",
    "{cloth} {type} in {colour} {tail}, {cuts}",
    "our {cuts} {type}, coloured {colour}, {second}",
    "a {cloth} {type}, {cuts}, mainly {colour} {tail}",
    "{cuts} {type}, {colour} {cloth} {tail}",
    "a {colour} {type} {second} on {background}, {cuts}",
    "the {cuts} {type} shown here comes in {colour} {second}",
    "{cuts} {cloth} {type} | {colour} {tail}",
)
# What people type into a search box: some of the attributes, in few words.
_BRIEF_WORDINGS = (
    "{type}",
    "{colour} {type}",
    "a {colour} {type}",
    "{cloth} {type}",
    "{colour} {cloth} {type}",
    "a {cloth} {colour} {type}",
    "{type} {second}",
    "{colour} {type} {second}",
    "{cuts} {colour} {type}",
    "{cuts} {type}",
)


@dataclass(frozen=True)
class Product:
    """One product of a synthetic catalog; `render` draws it.

    Attributes:
        id: unique over catalogs, splits and seeds.
        attributes: column -> value, the columns of `ATTRIBUTES[catalog]` in their order.
        cut: exact (wide, long) within the named cuts, each from 0 to 1.
    """

    id: str
    catalog: str
    attributes: dict[str, str]
    caption: str
    background: str
    brand: str
    price: float
    cut: tuple[float, float]
    pose: Pose
    light: float
    tint: tuple[float, float, float]

    def row(self) -> dict[str, str | float]:
        """The product as a metadata row without its `file_name`."""
        told: dict[str, str | float] = {"text": self.caption, "id": self.id, **self.attributes}
        return told | {
            "background": self.background,
            "brand": self.brand,
            "price": self.price,
            "catalog": self.catalog,
        }


def brief_caption(product: Product, seed: int = 0) -> tuple[str, frozenset[str]]:
    """A few words that suit the product, as one would type them to find it, and the columns that they tell of.

    Another product suits the same words if it is equal in those columns.
    """
    rng = np.random.default_rng([seed, *hashlib.sha256(product.id.encode()).digest()[:8]])
    wording = _BRIEF_WORDINGS[rng.integers(len(_BRIEF_WORDINGS))]
    told = {"type": ("type",), "colour": ("colour",), "cloth": ("pattern",), "second": ("pattern", "colour2")}
    told["cuts"] = tuple(_CUTS[product.catalog])
    columns = frozenset(column for field in re.findall(r"{(\w+)}", wording) for column in told[field])
    return _caption(product, _chooser(rng), wording), columns


def products(name: str, n: int, seed: int = 0, split: str = "train") -> list[Product]:
    """The first `n` products of a split.

    Product i is the same whatever `n` is. Splits and seeds never share a random stream. The split "test-unseen" holds
    only the one in eight combinations of (type, color, pattern) that the other splits never show.

    Raises:
        OptionError: for an unknown catalog or split, or `n` < 1.
    """
    if name not in CATALOGS:
        raise OptionError(f"There is no synthetic catalog {name!r}; choose one of {', '.join(CATALOGS)}.")
    if split not in SPLITS:
        raise OptionError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if n < 1 or seed < 0:
        raise OptionError(f"A catalog needs n >= 1 and seed >= 0, not n={n} and seed={seed}.")
    stream = [CATALOGS.index(name), SPLITS.index(split), seed]
    return [_draw(name, split, f"{name}-{split}-{seed}-{i:05d}", np.random.default_rng([*stream, i])) for i in range(n)]


def held_out(type: str, colour: str, pattern: str) -> bool:
    """Whether a combination belongs to "test-unseen" alone: one in eight does, by a fixed hash."""
    return hashlib.sha256(f"{type}/{colour}/{pattern}".encode()).digest()[0] % 8 == 0


def _draw(name: str, split: str, id: str, rng: np.random.Generator) -> Product:
    choose = _chooser(rng)
    attributes = {column: choose(values) for column, values in ATTRIBUTES[name].items()}
    while held_out(attributes["type"], attributes["colour"], attributes["pattern"]) != (split == "test-unseen"):
        attributes |= {column: choose(ATTRIBUTES[name][column]) for column in ("type", "colour", "pattern")}
    if attributes["pattern"] == "solid":
        attributes["colour2"] = "none"
    while attributes["pattern"] != "solid" and (attributes["colour2"] == "none" or _alike(attributes)):
        attributes["colour2"] = choose(SECOND_COLORS)
    long_name, wide_name = _CUTS[name]
    background = choose(tuple(BACKGROUNDS))
    product = Product(
        id=id,
        catalog=name,
        attributes=attributes,
        caption="",
        background=background,
        brand=choose(_BRANDS[name]),
        price=round(float(TYPES[name][attributes["type"]] * rng.lognormal(0.0, 0.25)), 2),
        cut=(
            _within(rng, attributes[wide_name] == _CUTS[name][wide_name][1]),
            _within(rng, attributes[long_name] == _CUTS[name][long_name][1]),
        ),
        pose=Pose(
            dx=float(rng.uniform(-0.03, 0.03)),
            dy=float(rng.uniform(-0.03, 0.03)),
            turn=float(rng.uniform(-0.09, 0.09)),
            scale=float(rng.uniform(1.02, 1.14)),
        ),
        light=float(rng.uniform(0.1, 0.9)),
        tint=tuple(float(t) for t in rng.uniform(0.93, 1.07, 3)),  # type: ignore[arg-type]
    )
    return replace(product, caption=_caption(product, choose, _WORDINGS[rng.integers(len(_WORDINGS))]))


def _chooser(rng: np.random.Generator) -> Callable[[tuple[str, ...]], str]:
    return lambda values: values[rng.integers(len(values))]


def _alike(attributes: dict[str, str]) -> bool:
    """Whether the pattern would be hard to tell from the cloth that it lies on."""
    return (attributes["colour"], attributes["colour2"]) in {
        ("black", "black"), ("black", "navy"), ("yellow", "yellow"), ("pink", "pink"), ("blue", "navy"),
        ("brown", "black"), ("brown", "navy"), ("purple", "navy"), ("orange", "yellow"), ("purple", "black"),
    }  # fmt: skip


def _within(rng: np.random.Generator, high: bool) -> float:
    # The middle third stays empty: what a caption calls long must be visibly longer than what it calls short.
    return float(rng.uniform(0.7, 1.0) if high else rng.uniform(0.0, 0.3))


def _caption(product: Product, choose: Callable[[tuple[str, ...]], str], wording: str) -> str:
    def say(value: str) -> str:
        return choose(_SYNONYMS.get(value, (value,)))

    attributes = product.attributes
    cuts = [say(attributes[column]) for column in _CUTS[product.catalog]]
    plain, second = attributes["pattern"] == "solid", attributes["colour2"]
    told = wording.format(
        cuts=" ".join(cuts),
        colour=say(attributes["colour"]),
        type=say(attributes["type"]),
        cloth=say(attributes["pattern"]),
        second=choose(("in one colour", "without pattern"))
        if plain
        else f"with {second} {_NOUNS[attributes['pattern']]}",
        tail="" if plain else f"with {second}",
        background=f"{product.background} ground",
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(told.split()).replace(" ,", ","))


def render(product: Product, size: int = 64) -> Image.Image:
    """Draw a product as an RGB picture of `size` x `size` pixels, 64 to 512.

    Raises:
        OptionError: for a size outside that range.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise OptionError(f"A synthetic picture is {SIZES[0]} to {SIZES[1]} pixels wide, not {size}.")
    attributes = product.attributes
    wide, long = product.cut
    return paint(
        attributes["type"],
        attributes["colour"],
        attributes["colour2"] if attributes["colour2"] != "none" else None,
        attributes["pattern"],
        wide=wide,
        long=long,
        background=product.background,
        pose=product.pose,
        light=product.light,
        tint=product.tint,
        size=size,
    )


def write_catalog(
    name: str, out: str | Path, n: int = 400, seed: int = 0, split: str = "train", size: int = 64
) -> Path:
    """Write a catalog as an image folder: `images/*.png` and `metadata.jsonl` (`file_name`, `text` and the payload).

    The same arguments give the same bytes. Returns the folder.

    Raises:
        DataError: when the folder holds a catalog already.
        OptionError: as `products` and `render`.
    """
    folder = Path(out)
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        raise DataError(f"{folder} already holds a catalog (metadata.jsonl); choose a new folder or remove that one.")
    chosen = products(name, n, seed, split)
    render(chosen[0], size)  # a wrong size fails before anything is written
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for file, product in _named(chosen):
        render(product, size).save(folder / file)
        lines.append(json.dumps({"file_name": file} | product.row(), ensure_ascii=False))
    metadata.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _named(chosen: list[Product]) -> Iterator[tuple[str, Product]]:
    for product in chosen:
        yield f"images/{product.id}.png", product
