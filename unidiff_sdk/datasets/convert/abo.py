"""Amazon Berkeley Objects: product listings in several languages with their main images."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import find_folder, image_in, lines_of, words

__all__ = ["abo"]

_TEXTS = ("brand", "color", "material", "style")  # columns with values in several languages


def abo(source: str | Path, language: str = "en") -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of Amazon Berkeley Objects (Collins et al. 2022, CC BY 4.0).

    The layout is documented in the README.md of https://amazon-berkeley-objects.s3.amazonaws.com/index.html:

        SOURCE/listings/metadata/listings_0.json.gz    sixteen files with one JSON object a line, also unpacked
        SOURCE/images/metadata/images.csv.gz           image_id,height,width,path
        SOURCE/images/small/14/14fe8812.jpg            or images/original/

        {"item_id": "B07…", "item_name": [{"language_tag": "en_US", "value": "…"}], "main_image_id": "81…", …}

    The text is the item's name, the image its main image. Listings without a name in the language and repeated items
    are left out. The columns are product_type, brand, color, material, style, country and marketplace.

    Args:
        source: the folder.
        language: the start of a language tag: "en" takes en_US, en_GB, en_IN and others.

    Raises:
        DataError: a file is missing or has another format.
    """
    source = Path(source)
    folder = find_folder(source, ("listings/metadata",), "the listings of Amazon Berkeley Objects")
    listings = sorted((*folder.glob("listings_*.json.gz"), *folder.glob("listings_*.json")))
    if not listings:
        raise DataError(f"{folder} has no file such as listings_0.json.gz. Unpack abo-listings.tar there.")
    images = find_folder(source, ("images/small", "images/original"), "the images of Amazon Berkeley Objects")
    paths = _image_paths(source / "images" / "metadata")
    line, known = 0, set[str]()
    for file in listings:
        for content in filter(str.strip, lines_of(file)):
            line += 1
            listing = parse_json(content, f"{file}, line {line}", kind=object, nan=True)
            if not isinstance(listing, dict):
                raise DataError(f"{file}: line {line} must hold a JSON object")
            item, text = listing.get("item_id"), _in_language(listing.get("item_name"), language)
            if not isinstance(item, str) or item in known or not text:
                continue
            known.add(item)
            main = listing.get("main_image_id")
            image = image_in(images, paths.get(main, "")) if isinstance(main, str) else None
            if image is None:
                yield InvalidRow(line, f"{item}: {main}"[:100], "there is no such image")
            else:
                yield Pair(item, item, image, text, _columns(listing, language), line)


def _image_paths(folder: Path) -> dict[str, str]:
    """Path of each image by its id."""
    file = next((file for name in ("images.csv.gz", "images.csv") if (file := folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{folder} has no images.csv.gz. It is part of the archives of images.")
    try:
        rows = csv.DictReader(lines_of(file))
        if not {"image_id", "path"} <= set(rows.fieldnames or ()):
            raise DataError(f"{file} must have the columns image_id and path, but has {rows.fieldnames}")
        return {row["image_id"]: row["path"] or "" for row in rows}
    except csv.Error as error:
        raise DataError(f"{file}: {error}") from error


def _columns(listing: dict[str, Any], language: str) -> dict[str, Any]:
    values: dict[str, Any] = {"product_type": _in_language(listing.get("product_type"), "")}
    values |= {name: _in_language(listing.get(name), language) for name in _TEXTS}
    values |= {name: words(listing.get(name)) for name in ("country", "marketplace")}
    return {name: value for name, value in values.items() if value}


def _in_language(values: Any, language: str) -> str:
    """The first of several texts whose language tag starts so."""
    for value in values if isinstance(values, list) else ():
        if isinstance(value, dict) and str(value.get("language_tag", "")).startswith(language):
            return words(value.get("value"))
    return ""
