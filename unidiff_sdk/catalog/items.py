"""Items on their way into a catalog: checked, and in the form in which they are stored."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.json_values import checked_text, to_json
from unidiff_sdk.errors import OptionError
from unidiff_sdk.retrieval.query import open_image
from unidiff_sdk.retrieval.results import Hit
from unidiff_sdk.store import Record, Vector
from unidiff_sdk.store.filters import is_column_name
from unidiff_sdk.store.ids import checked_id, key_of
from unidiff_sdk.store.images import ItemImage
from unidiff_sdk.store.payload import RESERVED, SYSTEM, is_item, system_of

from .results import Generated

__all__ = ["Item", "checked_columns", "images_of", "item_of", "items_of", "refuse_reserved"]


@dataclass(frozen=True)
class Item:
    """One checked item.

    Attributes:
        id: the id of the caller, or a content hash.
        image: the image.
        columns: id, text and payload, as they are stored.
        name, line: the name of the image file and the line in the metadata file, for messages.
        source: the URI of the folder, shard or table that the item comes from.
        vector: the embedding, if it is known: the item is stored already with the same image.
        pixels: the preprocessed image, float32[3, size, size], of an item from a source that must be encoded.
    """

    id: str | int
    image: ItemImage
    columns: dict[str, Any]
    name: str = ""
    line: int = 0
    source: str | None = None
    vector: Vector | None = None
    pixels: NDArray[np.float32] | None = None

    @property
    def key(self) -> str:
        """The id in the store."""
        return key_of(self.id)

    def payload(self, uri: str) -> dict[str, Any]:
        """The stored payload; `uri` is the location of the image."""
        source = {"source": self.source} if self.source else {}
        return {**self.columns, SYSTEM: {"sha256": self.image.sha256, "uri": uri, **source}}


def item_of(image: ItemImage, text: str | None, id: Any, payload: Mapping[str, Any]) -> Item:
    """Check one item. Without an id, its id is a hash of image and caption. Raises OptionError."""
    refuse_reserved(payload)
    if text is not None and (not isinstance(text, str) or not text.strip()):
        raise OptionError(f"the caption {text!r} is not a non-empty string: give None for an image without a caption")
    text = None if text is None else checked_text(str.__str__(text))  # a plain string, not of a subclass
    if id is None:
        id = hashlib.sha256(f"{image.sha256}\0{text or ''}".encode()).hexdigest()[:32]
    id = checked_id(id)
    columns = {"id": id} | ({} if text is None else {"text": text.strip()}) | checked_columns(payload)
    return Item(id, image, columns)


def items_of(images: Any, texts: Any, ids: Any, payloads: Any) -> Iterator[Item]:
    """One item for each image. Every argument may be a single value or a sequence. Raises OptionError, ImageError."""
    sources = [images] if _is_single(images) else list(images)
    columns: dict[str, list[Any]] = {}
    for name, values in {"texts": texts, "ids": ids, "payloads": payloads}.items():
        single = values is None or isinstance(values, (str, int, Mapping)) or not isinstance(values, Iterable)
        columns[name] = [values] * (len(sources) if values is None else 1) if single else list(values)
        if len(columns[name]) != len(sources):
            raise OptionError(f"got {len(sources)} images and {len(columns[name])} {name}: give one for each image")
    ids = [id if id is None else checked_id(id) for id in columns.pop("ids")]
    for key, times in Counter(key_of(id) for id in ids if id is not None).items():
        if times > 1:
            raise OptionError(
                f"the id {next(id for id in ids if key_of(id) == key)!r} occurs {times} times: ids must be unique"
            )
    for source, text, payload, id in zip(sources, *columns.values(), ids, strict=True):
        image, payload = open_image(source), {} if payload is None else payload
        if not isinstance(payload, Mapping):
            raise OptionError(
                f"payload {payload!r:.60} is not a dictionary: give the columns of each item as a dictionary"
            )
        if isinstance(source, Generated):
            text, payload = text or source.prompt, {**source.payload, **payload}
        elif isinstance(source, Hit):
            text, payload, id = text or source.text, {**source.payload, **payload}, source.id if id is None else id
        yield item_of(image, text, id, payload)
        image.release()  # only hashed here; long lists of files are read again in batches


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim < 4
    return isinstance(
        images, (str, PathLike, bytes, bytearray, memoryview, Image.Image, Hit, Generated)
    ) or not isinstance(images, Iterable)


def images_of(records: Iterable[Record]) -> dict[str, str]:
    """The images of records: sha256 -> uri. Those of damaged records are unknown."""
    systems = [system_of(record.payload) for record in records if is_item(record.id, record.payload)]
    return {system["sha256"]: system["uri"] for system in systems}


def refuse_reserved(columns: Mapping[str, Any]) -> None:
    """Raise OptionError for a column name that items use for themselves."""
    for name in RESERVED:
        if name in columns:
            raise OptionError(f'"{name}" is a reserved column name: give captions as texts= and ids as ids=')


def checked_columns(payload: Mapping[str, Any]) -> dict[str, Any]:
    """A payload in the form in which it is stored."""
    columns: dict[str, Any] = {}
    for name, value in payload.items():
        if not is_column_name(name):
            raise OptionError(
                f"{name!r:.60} cannot be the name of a column, because a filter could not refer to it. Give a "
                "non-empty string without double quotes and backslashes."
            )
        columns[checked_text(str.__str__(name))] = to_json(value, f"payload.{name}", depth=1)
    return columns
