"""What is given to `Catalog.add`, row by row: checked, with its picture, and as it is stored."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.text import checked_text
from unidiff_sdk.errors import OptionError
from unidiff_sdk.retrieval.query import open_image
from unidiff_sdk.retrieval.results import Hit
from unidiff_sdk.store import Record, Vector
from unidiff_sdk.store.filters import MAX_DEPTH
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.images import ItemImage
from unidiff_sdk.store.payload import RESERVED, SYSTEM

from .results import Generated

__all__ = ["Item", "item_of", "items_of", "pictures_of"]


@dataclass(frozen=True)
class Item:
    """One row on its way in, checked."""

    id: str | int
    picture: ItemImage
    columns: dict[str, Any]  # id, text and payload, as they are stored
    name: str = ""  # of the image file, and the line in the metadata file of a folder
    line: int = 0
    source: str | None = None  # the folder or table it comes from
    vector: Vector | None = None  # where it is stored already, with the same picture and other columns
    pixels: NDArray[np.float32] | None = None  # for the encoder, of what is read from a folder and has no vector yet

    @property
    def key(self) -> str:
        return key_of(self.id)

    def payload(self, uri: str) -> dict[str, Any]:
        """What is stored beside the vector."""
        source = {"source": self.source} if self.source else {}
        return {**self.columns, SYSTEM: {"sha256": self.picture.sha256, "uri": uri, **source}}


def item_of(picture: ItemImage, text: str | None, id: Any, payload: Mapping[str, Any]) -> Item:
    """One item; without an id it gets one of its picture and caption. Raises OptionError for what cannot be stored."""
    for name in RESERVED:
        if name in payload:
            raise OptionError(f'"{name}" cannot be a column of a payload: captions go into texts=, ids into ids=')
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise OptionError(f"the caption {text!r} is empty; leave texts= out where there are no captions")
    checked_text(text or "")
    if id is None:
        id = hashlib.sha256(f"{picture.sha256}\0{text or ''}".encode()).hexdigest()[:32]
    key_of(id)
    columns = {"id": id} | ({} if text is None else {"text": text.strip()}) | _jsonable(payload, "payload")
    return Item(id, picture, columns)


def items_of(images: Any, texts: Any, ids: Any, payloads: Any) -> Iterator[Item]:
    """One item for each picture; every argument may be one value or a sequence."""
    sources = [images] if _is_single(images) else list(images)
    columns: dict[str, list[Any]] = {}
    for name, values in {"texts": texts, "ids": ids, "payloads": payloads}.items():
        single = values is None or isinstance(values, (str, int, Mapping)) or not isinstance(values, Iterable)
        columns[name] = [values] * (len(sources) if values is None else 1) if single else list(values)
        if len(columns[name]) != len(sources):
            raise OptionError(f"{len(sources)} images but {len(columns[name])} {name}: give one for each image")
    ids = [id.item() if isinstance(id, np.generic) else id for id in columns.pop("ids")]
    for key, times in Counter(key_of(id) for id in ids if id is not None).items():
        if times > 1:
            raise OptionError(f"the id {next(id for id in ids if key_of(id) == key)!r} is given {times} times")
    for source, text, payload, id in zip(sources, *columns.values(), ids, strict=True):
        picture, payload = open_image(source), {} if payload is None else payload
        if not isinstance(payload, Mapping):
            raise OptionError(f"a payload is a dictionary of columns, not {payload!r}")
        if isinstance(source, Generated):
            text, payload = text or source.prompt, {**source.payload, **payload}
        elif isinstance(source, Hit):
            text, payload, id = text or source.text, {**source.payload, **payload}, source.id if id is None else id
        yield item_of(picture, text, id, payload)
        picture.release()  # a long list of files is hashed here and read again, a batch at a time


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(
        images, (str, PathLike, bytes, bytearray, memoryview, Image.Image, Hit, Generated)
    ) or not isinstance(images, Iterable)


def pictures_of(records: Iterable[Record]) -> dict[str, str]:
    """The pictures that records show: sha256 -> uri."""
    return {record.payload[SYSTEM]["sha256"]: record.payload[SYSTEM]["uri"] for record in records}


def _jsonable(value: Any, name: str, depth: int = 0) -> Any:
    """A payload as JSON holds it: numpy scalars and arrays unwrapped, dates as ISO 8601."""
    if depth > MAX_DEPTH:
        raise OptionError(f"{name:.60} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return checked_text(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, (np.generic, np.ndarray)):
        return _jsonable(value.tolist(), name, depth)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {checked_text(key): _jsonable(item, f"{name}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item, name, depth + 1) for item in value]
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise OptionError(
        f"{name} is {value!r:.60}: a column holds JSON values (strings, finite numbers, true, null, lists, objects)"
    )
