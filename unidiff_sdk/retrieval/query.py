"""What is looked for: words, pictures, items and vectors, wanted and unwanted, mixed into one query vector.

**How a mix is scored.** CLIP keeps texts and pictures apart: a text agrees with every picture a little and with none
much, so its cosines are small and lie close together, while those of two pictures are large and spread wide (Liang et
al. 2022, "Mind the Gap"). Added up as they are, the picture drowns the words. So each part k of a query is measured by
how far it tells this catalog's items apart, and a text is first freed of what it says without meaning it:

    q = Σ_k c_k u_k        c_k = ± w_k / σ_k

u_k is the unit vector of a picture, an item or a raw vector. Of a text t it is t - m, less its component along n - m: m
is the mean of some of the catalog's captions, which is what texts have in common, and n the mean of a few texts that
say nothing; any text that leaves something open leans to where they lie. σ_k is the standard deviation of the dot
products of u_k with a sample of the catalog's items. Parts that are not wanted (`unlike`, `without`) have the minus
sign. The c_k are scaled so that those of the wanted parts add up to 1, so a score stays near the range of a cosine. A
query of one part has nothing to balance: its score is the plain cosine.

Measured with the built-in model, "a green handbag" beside the picture of a red one: how often the first hit is right in
type and color, over four synthetic catalogs of 300 to 500 products, with 150 to 300 pictures that are in none of
them. With weights of 0.7 and 0.3: 0.90 (plain sums: 0.93), with equal ones 0.68 (0.62), and with "green" alone beside
it 0.60 (0.53). That model has hardly a gap. With one put in, a vector that all pictures share and one that all texts
share, 0.6 of the squared length of each, the formula keeps 0.91, 0.68 and 0.59, and plain sums fall to 0.82, 0.57 and
0.48.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from unidiff_sdk._internal.images import HasImage
from unidiff_sdk._internal.text import checked_text
from unidiff_sdk.errors import OptionError
from unidiff_sdk.store import Vector
from unidiff_sdk.store.ids import key_of
from unidiff_sdk.store.images import ItemImage

from .results import Hit

__all__ = ["MOST_IMAGINED", "NEUTRAL_TEXTS", "WEIGHTS", "Gap", "Query", "beside", "ids_of", "mix", "picture_of", "unit"]

# What a query can be made of, and what each part weighs unless the caller says otherwise. Of "without", half as much
# turns most of what is not wanted away and still keeps to what is; as much loses sight of it. "imagined" is what the
# text looks like when it is drawn: see `imagination`.
WEIGHTS = {"text": 1.0, "imagined": 0.5, "image": 1.0, "like": 1.0, "vector": 1.0, "unlike": 0.5, "without": 0.5}
UNWANTED = ("unlike", "without")
OF_TEXTS = ("text", "without")

NEUTRAL_TEXTS = ("a photo", "a picture of something", "a product")

_LISTS = (list, tuple, set, frozenset)


@dataclass(frozen=True)
class Query:
    """One query, checked; `picture` is the image to encode, or a hit whose vector is stored already.

    `imagine` is how many pictures of the text are drawn and looked for beside it.
    """

    text: str | None
    imagine: int
    picture: ItemImage | Hit | None
    like: tuple[str | int, ...]
    unlike: tuple[str | int, ...]
    without: tuple[str, ...]
    vector: Vector | None
    weights: Mapping[str, float]

    @classmethod
    def of(
        cls,
        text: str | None = None,
        *,
        imagine: int = 0,
        image: Any = None,
        like: Any = None,
        unlike: Any = None,
        without: str | Sequence[str] | None = None,
        vector: npt.ArrayLike | None = None,
        weights: tuple[float, float] | Mapping[str, float] | None = None,
    ) -> Query:
        """Check what `Catalog.search` was given. Raises OptionError, ImageError."""
        query = cls(
            text=None if text is None else _words("text", text),
            imagine=_imagined(imagine, text),
            picture=image if image is None or isinstance(image, Hit) else picture_of(image),
            like=ids_of(like),
            unlike=ids_of(unlike),
            without=tuple(_words("without", one) for one in _listed(without)),
            vector=None if vector is None else _raw(vector),
            weights=_weights(weights),
        )
        if not query.parts:
            raise OptionError(
                "search for something: a text, image=, like= or vector=; or for what is far from unlike= or without="
            )
        if not any(query.weights[part] for part in query.parts):
            raise OptionError(f"weights={weights!r}: at least one of {', '.join(query.parts)} must weigh more than 0")
        return query

    @property
    def parts(self) -> list[str]:
        """Which of `WEIGHTS` this query is made of."""
        given = {
            "text": self.text is not None,
            "imagined": self.imagine > 0,
            "image": self.picture is not None,
            "like": bool(self.like),
            "vector": self.vector is not None,
            "unlike": bool(self.unlike),
            "without": bool(self.without),
        }
        return [part for part, is_given in given.items() if is_given]

    @property
    def examples(self) -> tuple[str, ...]:
        """The keys of the items that it names: they are no answers to it."""
        return tuple(key_of(id) for id in (*self.like, *self.unlike))

    def digest(self) -> bytes:
        """8 bytes that are the same for the same query, on every machine."""
        vector = b"" if self.vector is None else self.vector.tobytes()
        picture = "" if self.picture is None else self.picture.sha256
        said = (self.text, self.imagine, picture, self.like, self.unlike, self.without, sorted(self.weights.items()))
        return hashlib.sha256(repr(said).encode() + vector).digest()[:8]


@dataclass(frozen=True)
class Gap:
    """What `mix` must know of a catalog.

    Attributes:
        sample: some of its vectors, float32[n, dim].
        caption: the mean embedding of some of its captions, float32[dim]; zero if it has none.
        neutral: the mean embedding of texts that say nothing.
    """

    sample: Vector
    caption: Vector
    neutral: Vector

    def meant(self, text: Vector) -> Vector:
        """What an embedding of a text says beyond what texts say anyway."""
        nothing = self.neutral - self.caption
        said = text - self.caption
        return cast(Vector, said - (said @ nothing) / max(float(nothing @ nothing), 1e-12) * nothing)


def mix(parts: Mapping[str, Vector], weights: Mapping[str, float], gap: Gap) -> Vector:
    """The query vector of several parts (unit vectors, by their names in `WEIGHTS`), by the formula above."""
    meant = {part: gap.meant(vector) if part in OF_TEXTS else vector for part, vector in parts.items()}
    return _balanced(meant, weights, gap.sample)


def beside(asked: Vector, imagined: Vector, weights: Mapping[str, float], parts: Iterable[str], gap: Gap) -> Vector:
    """The query vector of a query and of what it looks like when it is drawn, each measured by its own spread.

    Nothing is taken from the query: it ranks as it would without pictures, and they are added to that.

    Args:
        asked: the query vector without pictures, float32[dim].
        imagined: the direction of the pictures, float32[dim].
        weights: of the parts and of "imagined".
        parts: what `asked` is made of; the weights of those that are wanted are its own.
        gap: with the sample of items.
    """
    own = sum(weights[part] for part in parts if part not in UNWANTED)
    both = {"text": own, "imagined": weights["imagined"]}
    return _balanced({"text": asked, "imagined": imagined}, both, gap.sample)


def _balanced(vectors: Mapping[str, Vector], weights: Mapping[str, float], sample: Vector) -> Vector:
    spreads = {part: _spread(vector, sample) for part, vector in vectors.items()}
    if not all(spreads.values()):  # fewer than two different items: nothing to measure by
        spreads = dict.fromkeys(spreads, 1.0)
    signed = {p: (-1 if p in UNWANTED else 1) * weights[p] / spread for p, spread in spreads.items()}
    scale = sum(c for c in signed.values() if c > 0) or sum(abs(c) for c in signed.values())
    return cast(Vector, sum(c / scale * vectors[part] for part, c in signed.items())).astype(np.float32)


def _spread(vector: Vector, sample: Vector) -> float:
    spread = float((sample @ vector).std()) if len(sample) else 0.0
    return spread if spread > 1e-6 else 0.0


def unit(vectors: Iterable[Vector]) -> Vector:
    """The direction of the mean of some vectors."""
    mean = np.mean(list(vectors), axis=0)
    return cast(Vector, (mean / max(float(np.linalg.norm(mean)), 1e-12)).astype(np.float32))


def picture_of(source: Any) -> ItemImage:
    """The picture to encode or to keep, of anything that is one: a file, bytes, pixels, a hit, a generated picture."""
    if isinstance(source, Hit):
        return ItemImage(source._images.path(source.uri))
    return ItemImage(source.image if isinstance(source, HasImage) else source)


# ------------------------------------------------------------------------------------------------ checks


def _words(name: str, text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise OptionError(f"{name}={text!r:.60}: it must be words to look for")
    return checked_text(text)


def _imagined(imagine: Any, text: str | None) -> int:
    if isinstance(imagine, bool) or not isinstance(imagine, int) or not 0 <= imagine <= MOST_IMAGINED:
        raise OptionError(f"imagine={imagine!r:.60}: it is how many pictures are drawn, from 0 to {MOST_IMAGINED}")
    if imagine and text is None:
        raise OptionError("imagine= draws what a text asks for: give a text")
    return imagine


def _listed(values: Any) -> Sequence[Any]:
    if values is None:
        return []
    if isinstance(values, (set, frozenset)):
        return sorted(values, key=repr)  # in one order in every process: a cursor hangs on it
    if isinstance(values, _LISTS) or (isinstance(values, Sequence) and not isinstance(values, (str, bytes))):
        return list(values)
    return [values]


def ids_of(examples: Any) -> tuple[str | int, ...]:
    """The ids of what names items: one id or hit, several of them, or None for none. Raises OptionError."""
    ids = []
    for example in _listed(examples):
        id = example.id if isinstance(example, Hit) else example
        id = id.item() if isinstance(id, np.generic) else id
        key_of(id)
        ids.append(id)
    return tuple(ids)


def _raw(vector: npt.ArrayLike) -> Vector:
    try:
        array = np.asarray(vector, np.float32)
    except (TypeError, ValueError) as error:
        raise OptionError(f"vector={vector!r:.60}: it must be a sequence of numbers ({error})") from None
    norm = float(np.linalg.norm(array))
    if array.ndim != 1 or not math.isfinite(norm) or norm == 0:
        raise OptionError(
            f"vector= of shape {array.shape} and length {norm:g}: it must be one row of finite numbers, not all zero"
        )
    return cast(Vector, array / norm)


def _weights(weights: Any) -> dict[str, float]:
    given = dict(zip(("text", "image"), weights, strict=False)) if isinstance(weights, _LISTS) else weights
    if given is None:
        return dict(WEIGHTS)
    if not isinstance(given, Mapping) or (isinstance(weights, _LISTS) and len(weights) != 2):
        raise OptionError(
            f"weights={weights!r:.60}: give two numbers for text and image such as (0.4, 0.6), or a dictionary of "
            f"{', '.join(WEIGHTS)}"
        )
    for name, weight in given.items():
        if name not in WEIGHTS:
            raise OptionError(f"weights: {name!r:.60} is no part of a query; those are {', '.join(WEIGHTS)}")
        number = isinstance(weight, (int, float, np.number)) and not isinstance(weight, bool)
        if not number or not 0 <= weight < math.inf:
            raise OptionError(f"weights={weights!r:.80}: a weight is a finite number and not negative")
    return WEIGHTS | {name: float(weight) for name, weight in given.items()}


MOST_IMAGINED = 16  # for one text
