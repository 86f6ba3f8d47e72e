"""Queries: the texts, images, items and vectors to search with, checked."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from unidiff_sdk._internal.images import HasImage
from unidiff_sdk._internal.json_values import checked_text, plain_number
from unidiff_sdk.errors import OptionError, StoredImageError
from unidiff_sdk.store import Vector
from unidiff_sdk.store.ids import checked_id, key_of
from unidiff_sdk.store.images import ItemImage

from .mixing import WEIGHTS
from .options import call_with
from .results import Hit

__all__ = ["MAX_IMAGINED", "Query", "batch_of", "checked_ids", "generates", "open_image"]

MAX_IMAGINED = 16  # images generated from one text

_COLLECTIONS = (list, tuple, set, frozenset)


@dataclass(frozen=True)
class Query:
    """One checked query.

    Attributes:
        text: the text query.
        imagine: the number of images to generate from the text and to search with as well.
        image: the image to encode, or a hit with a stored embedding.
        like, unlike: ids of items to approach, and of items to avoid.
        without: texts to avoid.
        vector: a unit vector, float32[dim].
        weights: the weight of each part (`mixing.WEIGHTS`).
    """

    text: str | None
    imagine: int
    image: ItemImage | Hit | None
    like: tuple[str | int, ...]
    unlike: tuple[str | int, ...]
    without: tuple[str, ...]
    vector: Vector | None
    weights: Mapping[str, float]

    @classmethod
    def of(
        cls,
        text: str | None = None,
        imagine: int = 0,
        image: Any = None,
        like: Any = None,
        unlike: Any = None,
        without: str | Sequence[str] | None = None,
        vector: npt.ArrayLike | None = None,
        weights: tuple[float, float] | Mapping[str, float] | None = None,
    ) -> Query:
        """Check the query arguments of `Catalog.search`. Raises OptionError, ImageError."""
        query = cls(
            text=None if text is None else _text("text", text),
            imagine=_imagine(plain_number(imagine), text),
            image=image if image is None or isinstance(image, Hit) else open_image(image),
            like=checked_ids(like),
            unlike=checked_ids(unlike),
            without=tuple(_text("without", value) for value in _as_list(without)),
            vector=None if vector is None else _unit_vector(vector),
            weights=_weights(weights),
        )
        if not query.parts:
            raise OptionError("The query is empty: give a text, image=, like=, vector=, unlike= or without=")
        if not any(query.weights[part] for part in query.parts):
            raise OptionError(f"weights={weights!r}: give at least one of {', '.join(query.parts)} a weight above 0")
        _check_weighted(weights, query.parts)
        return query

    @cached_property
    def parts(self) -> list[str]:
        """The names in `mixing.WEIGHTS` of the parts of this query."""
        given = {
            "text": self.text is not None,
            "imagined": self.imagine > 0,
            "image": self.image is not None,
            "like": bool(self.like),
            "vector": self.vector is not None,
            "unlike": bool(self.unlike),
            "without": bool(self.without),
        }
        return [part for part, is_given in given.items() if is_given]

    @property
    def examples(self) -> tuple[str, ...]:
        """The keys of the items that the query names. They are excluded from its hits."""
        return tuple(key_of(id) for id in (*self.like, *self.unlike))

    def digest(self) -> bytes:
        """8 bytes that identify the query, the same on every machine."""
        vector = b"" if self.vector is None else self.vector.tobytes()
        image = "" if self.image is None else self.image.sha256
        content = (self.text, self.imagine, image, self.like, self.unlike, self.without, sorted(self.weights.items()))
        return hashlib.sha256(repr(content).encode() + vector).digest()[:8]


def batch_of(queries: Any) -> list[Query]:
    """The queries of `Catalog.search_batch`, each a text or a dictionary of query arguments. Raises OptionError."""
    if isinstance(queries, (str, Mapping)) or not isinstance(queries, Iterable):
        raise OptionError(f"queries is {queries!r:.60}: give a list of queries; for a single one, use search")
    return [call_with(Query.of, {"text": query} if isinstance(query, str) else query, "a query") for query in queries]


def generates(queries: Any = None, *, imagine: Any = 0, **options: Any) -> bool:
    """Whether a call of `Catalog.search` or `search_batch` with these arguments generates images. It checks nothing."""
    batch = queries if isinstance(queries, _COLLECTIONS) else ()
    each = [query.get("imagine") for query in batch if isinstance(query, Mapping)]
    return any(isinstance(n, int | np.integer) and n > 0 for n in (imagine, *each))


def open_image(source: Any) -> ItemImage:
    """The image to encode or to store, from a file, bytes, pixels, a hit or a generated image. Raises ImageError."""
    if isinstance(source, Hit):
        return ItemImage(source._images.path(source.uri), StoredImageError)
    return ItemImage(source.image if isinstance(source, HasImage) else source)


def checked_ids(examples: Any) -> tuple[str | int, ...]:
    """The ids of one item or several, each given as an id or a hit; None means none. Raises OptionError."""
    ids = []
    for example in _as_list(examples):
        id = example.id if isinstance(example, Hit) else example
        ids.append(checked_id(id))
    return tuple(ids)


def _text(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise OptionError(f"{name}={text!r:.60}: give a non-empty string")
    return checked_text(text)


def _imagine(imagine: Any, text: str | None) -> int:
    if isinstance(imagine, bool) or not isinstance(imagine, int) or not 0 <= imagine <= MAX_IMAGINED:
        raise OptionError(f"imagine={imagine!r:.60}: give the number of images to generate, 0 to {MAX_IMAGINED}")
    if imagine and text is None:
        raise OptionError(f"imagine={imagine} generates images from a text: give a text")
    return imagine


def _as_list(values: Any) -> Sequence[Any]:
    if values is None:
        return []
    if isinstance(values, (set, frozenset)):
        return sorted(values, key=repr)  # the same order in every process: cursors depend on it
    if isinstance(values, _COLLECTIONS) or (isinstance(values, Sequence) and not isinstance(values, (str, bytes))):
        return list(values)
    return [values]


def _unit_vector(vector: npt.ArrayLike) -> Vector:
    try:
        array = np.asarray(vector, np.float32)
    except (TypeError, ValueError) as error:
        raise OptionError(f"vector={vector!r:.60}: give a sequence of numbers ({error})") from None
    norm = float(np.linalg.norm(array))
    if array.ndim != 1 or not math.isfinite(norm) or norm == 0:
        raise OptionError(
            f"vector= has shape {array.shape} and norm {norm:g}: give one dimension of finite numbers, not all zero"
        )
    return cast(Vector, array / norm)


def _check_weighted(weights: Any, parts: Sequence[str]) -> None:
    """Raise OptionError if weights cannot have an effect on a query of these parts."""
    if weights is None:
        return
    named = list(weights) if isinstance(weights, Mapping) else ["text", "image"]
    if missing := [part for part in named if part not in parts]:
        raise OptionError(
            f"weights= names {', '.join(missing)}, which the query does not have. Its parts: {', '.join(parts)}"
        )
    if len(parts) == 1:
        raise OptionError(f"weights= has no effect on a query of one part ({parts[0]}). Omit it, or add another part.")


def _weights(weights: Any) -> dict[str, float]:
    if weights is None:
        return dict(WEIGHTS)
    if isinstance(weights, np.ndarray):
        weights = weights.tolist()
    given = dict(zip(("text", "image"), weights, strict=False)) if isinstance(weights, _COLLECTIONS) else weights
    if not isinstance(given, Mapping) or (isinstance(weights, _COLLECTIONS) and len(weights) != 2):
        raise OptionError(
            f"weights={weights!r:.60}: give two numbers (text, image) such as (0.4, 0.6), or a dictionary with keys "
            f"from {', '.join(WEIGHTS)}"
        )
    for name, weight in ((name, plain_number(weight)) for name, weight in given.items()):
        if name not in WEIGHTS:
            raise OptionError(f"weights: {name!r:.60} is not a part of a query. Parts: {', '.join(WEIGHTS)}")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 <= weight < math.inf:
            raise OptionError(f"weights={weights!r:.80}: give each weight as a finite number of at least 0")
    return WEIGHTS | {name: float(weight) for name, weight in given.items()}
