"""M5Product: products of a shop with Chinese titles and attributes."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import open_regular_file
from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError

from .pairs import Pair
from .source_files import IMAGE_SUFFIXES

__all__ = ["m5product", "read_members"]

_ANNOTATIONS = "*id_label.json"
_CHUNK, _MAX_ENTRY = 1 << 20, 1 << 24  # characters
_OPENING, _COLON, _COMMA = re.compile(r"\s*\{\s*"), re.compile(r"\s*:\s*"), re.compile(r"\s*(,\s*|(?=\}))")


def m5product(source: str | Path) -> Iterator[Pair | InvalidRow]:
    """Iterate over the pairs of M5Product (Dong et al. 2022, "M5Product: Self-harmonized Contrastive Learning").

    The dataset is described at https://xiaodongsuper.github.io/M5Product_dataset/, and the annotations in the programs
    of https://github.com/Xiaodongsuper/M5Product_toolkit. Layout:

        SOURCE/product1m_product5m_id_label.json    or one other file *id_label.json, read in chunks (gigabytes)
        SOURCE/images/ID.jpg                        the main images, downloaded from the `url` of each product

        {"ID": {"title": "…", "label": "…", "url": "…", "pv": "name#:#value#;#name#:#value"}, …}

    Only products with an image are converted. Titles are Chinese, so the CLIP that is tuned must support Chinese. The
    columns are label (the category) and attributes (name -> list of values).

    Raises:
        DataError: the annotations or images/ are missing or have another format.
    """
    source = Path(source)
    whole = source / "product1m_product5m_id_label.json"
    files = [whole] if whole.is_file() else sorted(source.glob(_ANNOTATIONS))
    if len(files) != 1:
        raise DataError(f"{source}: found {len(files)} annotation files. Expected one file that ends in id_label.json.")
    (annotations,) = files
    images = source / "images"
    if not images.is_dir():
        raise DataError(f"{images}: there is no such folder. Put the main image of each product there as ID.jpg.")
    files_by_id = {image.stem: image for image in images.iterdir() if image.suffix.lower() in IMAGE_SUFFIXES}
    for line, (id, product) in enumerate(read_members(annotations), start=1):
        if id not in files_by_id:  # usually only some of the six million images are downloaded
            continue
        image = files_by_id.pop(id)
        if not isinstance(product, dict) or not isinstance(title := product.get("title"), str) or not title.strip():
            yield InvalidRow(line, id, "the title is missing")
        else:
            columns = {"label": str(product.get("label", "")), "attributes": _properties(str(product.get("pv", "")))}
            yield Pair(id, id, image, title.strip(), columns, line)
    for image in files_by_id.values():
        yield InvalidRow(0, image.name, f"{annotations.name} has no such product")


def _properties(pv: str) -> dict[str, list[str]]:
    """Parse "name#:#value#;#name#:#value". A name can have several values."""
    found: dict[str, list[str]] = {}
    for item in pv.split("#;#"):
        name, separator, value = item.partition("#:#")
        if separator and name.strip() and value.strip():
            found.setdefault(name.strip(), []).append(value.strip())
    return found


def read_members(file: Path, chunk_size: int = _CHUNK) -> Iterator[tuple[str, Any]]:
    """Iterate over the members of the JSON object in a file, which can be larger than the memory.

    Args:
        file: UTF-8.
        chunk_size: characters to read at a time.

    Raises:
        DataError: the file is truncated, is not UTF-8, or does not hold a JSON object.
    """
    decode = json.JSONDecoder(parse_int=float).raw_decode  # only finds the end of a member
    with io.TextIOWrapper(open_regular_file(file, DataError), encoding="utf-8-sig") as stream, _read_errors(file):
        text, place = stream.read(chunk_size), 0
        opening = _OPENING.match(text)
        if opening is None:
            raise DataError(f"{file}: must hold a JSON object from product id to its annotation")
        place = opening.end()
        while not text.startswith("}", place):
            try:
                key, end = decode(text, place)
                start = _after(_COLON, text, end)
                _, value_end = decode(text, start)
                end = _after(_COMMA, text, value_end)
            except (ValueError, RecursionError) as error:
                more = stream.read(chunk_size)  # the chunk may end within the member
                if not more or len(text) - place > _MAX_ENTRY:
                    raise DataError(f"{file}: truncated or not valid JSON near {text[place : place + 60]!r}") from error
                text, place = (text[place:] + more).lstrip(), 0
                continue
            if not isinstance(key, str):
                raise DataError(f"{file}: must hold a JSON object, but has the key {key!r:.60}")
            name = f"{file}: the annotation of {key!r:.60}"
            yield key, parse_json(text[start:value_end], name, kind=object, nan=True)
            place = end


@contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    found = pattern.match(text, place)
    if found is None:
        raise json.JSONDecodeError(f"Expecting {pattern.pattern}", text, place)
    return found.end()
