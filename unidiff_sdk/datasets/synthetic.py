"""Three synthetic catalogs: rendered products with exact attributes, varied captions, brands and prices.

    write_catalog("fashion-woman", "products", n=300)

    products/images/00000.png
    products/metadata.jsonl

    {"file_name": "images/00000.png",
     "text": "product picture: blue polka dot tank top with pink, cropped slim", "id": "fashion-woman-train-0-00000",
     "type": "tank top", "colour": "blue", "colour2": "pink", "pattern": "dotted", "length": "short", "fit": "slim",
     "background": "rose", "brand": "Maren", "price": 20.13, "catalog": "fashion-woman"}

The catalogs are fashion-man, fashion-woman and ecommerce-product. They contain no photographs and no real brands. A
product depends only on (catalog, split, seed, index). The columns and caption words are fixed, because the built-in
model is trained on them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from unidiff_sdk._internal.json_values import whole_number
from unidiff_sdk.errors import DataError, OptionError

from .drawing import BACKGROUNDS, COLORS, Pose, render_product

SPLITS = ("train", "val", "test", "test-unseen")
SIZES = (64, 512)
MAIN_COLORS = tuple(COLORS)[:10]
SECOND_COLORS = ("white", "black", "yellow", "navy", "pink")
PATTERNS = ("solid", "striped", "diagonal", "checked", "dotted")

TYPES: dict[str, dict[str, float]] = {  # the median price of each type
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
# The two cuts: column -> the words in captions.
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
"""The attributes that captions describe: catalog -> column -> values. Products that are equal in all of them have the
same meaning, so each is relevant to the captions of the others."""

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
# {cuts} is "long slim", {cloth} is "striped" or "plain", {second} is "with white stripes" or "in one colour", {tail} is
# "with white" or empty.
_WORDINGS = (
    "a {cuts} {color} {type} {second}",
    "{color} {type}, {cuts}, {second}",
    "a photo of a {cuts} {cloth} {color} {type} {tail}",
    "{cuts} {type} in {color} {second}",
    "product picture: {color} {cloth} {type} {tail}, {cuts}",
    "{type}, {color} and {cuts}, {second}",
    "this {type} is {color}, {cuts}, {second}",
    "new in: {cuts} {color} {cloth} {type} {tail}",
    "buy a {color} {type} {second} in a {cuts} cut",
    "{cloth} {type} in {color} {tail}, {cuts}",
    "our {cuts} {type}, coloured {color}, {second}",
    "a {cloth} {type}, {cuts}, mainly {color} {tail}",
    "{cuts} {type}, {color} {cloth} {tail}",
    "a {color} {type} {second} on {background}, {cuts}",
    "the {cuts} {type} shown here comes in {color} {second}",
    "{cuts} {cloth} {type} | {color} {tail}",
)
# Search queries: some of the attributes in a few words.
_BRIEF_WORDINGS = (
    "{type}",
    "{color} {type}",
    "a {color} {type}",
    "{cloth} {type}",
    "{color} {cloth} {type}",
    "a {cloth} {color} {type}",
    "{type} {second}",
    "{color} {type} {second}",
    "{cuts} {color} {type}",
    "{cuts} {type}",
)


@dataclass(frozen=True)
class Product:
    """One product of a synthetic catalog. `render` makes its image.

    Attributes:
        id: unique over catalogs, splits and seeds.
        catalog: the name of the catalog.
        attributes: column -> value, in the order of `ATTRIBUTES[catalog]`.
        caption: describes all attributes.
        background: a key of `drawing.BACKGROUNDS`.
        brand: a fictional brand.
        price: a price around the median of the type.
        cut: the exact width and length, each from 0 to 1.
        pose: position, rotation and scale.
        light: the position of the light, from 0 (left) to 1 (right).
        tint: factors on the red, green and blue of the cloth.
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
        """The product as a row of metadata.jsonl, without `file_name`."""
        columns: dict[str, str | float] = {"text": self.caption, "id": self.id, **self.attributes}
        return columns | {
            "background": self.background,
            "brand": self.brand,
            "price": self.price,
            "catalog": self.catalog,
        }


def brief_caption(product: Product, seed: int = 0) -> tuple[str, frozenset[str]]:
    """A short search query for a product.

    Args:
        product: the product.
        seed: selects the wording.

    Returns:
        The query, and the columns that it describes. Products that are equal in these columns match the query, too.
    """
    rng = np.random.default_rng([seed, *hashlib.sha256(product.id.encode()).digest()[:8]])
    wording = _BRIEF_WORDINGS[rng.integers(len(_BRIEF_WORDINGS))]
    described = {"type": ("type",), "color": ("colour",), "cloth": ("pattern",), "second": ("pattern", "colour2")}
    described["cuts"] = tuple(_CUTS[product.catalog])
    columns = frozenset(column for field in re.findall(r"{(\w+)}", wording) for column in described[field])
    return _caption(product, _chooser(rng), wording), columns


def products(name: str, n: int, seed: int = 0, split: str = "train") -> list[Product]:
    """Return the first `n` products of a split.

    Product i does not depend on `n`. Every split and seed has its own random stream.

    Args:
        name: fashion-man, fashion-woman or ecommerce-product.
        n: the number of products, at least 1.
        seed: at least 0.
        split: train, val, test or test-unseen. test-unseen has only the combinations of type, color and pattern, one
            in eight, that the other splits never contain.

    Raises:
        OptionError: the catalog or split does not exist, or a number is out of range.
    """
    if name not in CATALOGS:
        raise OptionError(f"There is no synthetic catalog {name!r}. Choose one of {', '.join(CATALOGS)}.")
    if split not in SPLITS:
        raise OptionError(f"There is no split {split!r}. Choose one of {', '.join(SPLITS)}.")
    n, seed = whole_number("n", n, at_least=1), whole_number("seed", seed, at_least=0)
    stream = [CATALOGS.index(name), SPLITS.index(split), seed]
    return [
        _sample(name, split, f"{name}-{split}-{seed}-{i:05d}", np.random.default_rng([*stream, i])) for i in range(n)
    ]


def held_out(type: str, color: str, pattern: str) -> bool:
    """Whether a combination occurs only in the split test-unseen. A fixed hash selects one in eight."""
    return hashlib.sha256(f"{type}/{color}/{pattern}".encode()).digest()[0] % 8 == 0


def _sample(name: str, split: str, id: str, rng: np.random.Generator) -> Product:
    choose = _chooser(rng)
    attributes = {column: choose(values) for column, values in ATTRIBUTES[name].items()}
    while held_out(attributes["type"], attributes["colour"], attributes["pattern"]) != (split == "test-unseen"):
        attributes |= {column: choose(ATTRIBUTES[name][column]) for column in ("type", "colour", "pattern")}
    if attributes["pattern"] == "solid":
        attributes["colour2"] = "none"
    while attributes["pattern"] != "solid" and (attributes["colour2"] == "none" or _too_similar(attributes)):
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


def _too_similar(attributes: dict[str, str]) -> bool:
    """Whether the two colors are too similar for a visible pattern."""
    return (attributes["colour"], attributes["colour2"]) in {
        ("black", "black"), ("black", "navy"), ("yellow", "yellow"), ("pink", "pink"), ("blue", "navy"),
        ("brown", "black"), ("brown", "navy"), ("purple", "navy"), ("orange", "yellow"), ("purple", "black"),
    }  # fmt: skip


def _within(rng: np.random.Generator, high: bool) -> float:
    # Nothing is in the middle, so that a "long" product is visibly longer than a "short" one.
    return float(rng.uniform(0.7, 1.0) if high else rng.uniform(0.0, 0.3))


def _caption(product: Product, choose: Callable[[tuple[str, ...]], str], wording: str) -> str:
    def synonym(value: str) -> str:
        return choose(_SYNONYMS.get(value, (value,)))

    attributes = product.attributes
    cuts = [synonym(attributes[column]) for column in _CUTS[product.catalog]]
    plain, second = attributes["pattern"] == "solid", attributes["colour2"]
    text = wording.format(
        cuts=" ".join(cuts),
        color=synonym(attributes["colour"]),
        type=synonym(attributes["type"]),
        cloth=synonym(attributes["pattern"]),
        second=choose(("in one colour", "without pattern"))
        if plain
        else f"with {second} {_NOUNS[attributes['pattern']]}",
        tail="" if plain else f"with {second}",
        background=f"{product.background} ground",
    )
    return re.sub(r"\ba (?=[aeiou])", "an ", " ".join(text.split()).replace(" ,", ","))


def render(product: Product, size: int = 64) -> Image.Image:
    """Render the image of a product, RGB.

    Args:
        product: the product.
        size: width and height in pixels, 64 to 512.

    Raises:
        OptionError: the size is out of range.
    """
    if not SIZES[0] <= size <= SIZES[1]:
        raise OptionError(f"size={size}: a synthetic image has {SIZES[0]} to {SIZES[1]} pixels on each side.")
    attributes = product.attributes
    wide, long = product.cut
    return render_product(
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
    """Write a catalog as a folder of images with metadata.jsonl. The same arguments write the same bytes.

    Args:
        name, n, seed, split: as for `products`.
        out: the folder.
        size: width and height of the images in pixels, 64 to 512.

    Returns:
        The folder.

    Raises:
        DataError: the folder already contains a catalog.
        OptionError: an argument is out of range.
    """
    folder = Path(out)
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        raise DataError(f"{folder} already contains a catalog (metadata.jsonl). Choose another folder, or remove it.")
    chosen = products(name, n, seed, split)
    render(chosen[0], size)  # fails for an invalid size before anything is written
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, product in enumerate(chosen):
        file = f"images/{number:05d}.png"  # not the id: Hugging Face takes the "val" in a file name for its split
        render(product, size).save(folder / file)
        lines.append(json.dumps({"file_name": file} | product.row(), ensure_ascii=False))
    metadata.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
