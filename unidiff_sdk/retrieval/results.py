"""Search results: hits in pages."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from unidiff_sdk._internal.json_values import whole_number
from unidiff_sdk._internal.text import shorten
from unidiff_sdk.store.images import THUMBNAIL_SIZE, ImageStore
from unidiff_sdk.store.payload import RESERVED, system_of

if TYPE_CHECKING:
    from PIL import Image


__all__ = ["Hit", "Page", "figure", "gallery"]


@dataclass(frozen=True)
class Hit:
    """One item of a catalog, found by a search or by `Catalog.get`.

    Attributes:
        id: the caller's id, or the content hash of an item added without one.
        score: the similarity to the query. For one text, image or vector, its cosine; for a mix, about the weighted
            mean of the cosines (`mixing`); for a hybrid search, the fused ranks; 1 if nothing was compared.
        text: the caption; None if the item has none.
        payload: all other columns.
        uri: the location of the original image, relative to the image store.
        sha256: the hash of the image.
        rerank_score: with `rerank`, the value that ordered this hit among the re-ranked ones, higher first; it compares
            only hits of one search. None for hits that were not re-ranked.
        gain: with `rerank`, the share by which the text lowers the generator's error on the image, at most 1. It is
            negative if the image is more likely without the text.
    """

    id: str | int
    score: float
    text: str | None
    payload: dict[str, Any] = field(repr=False)
    uri: str = field(repr=False)
    sha256: str = field(repr=False)
    _images: ImageStore = field(repr=False, compare=False)
    rerank_score: float | None = field(default=None, repr=False)
    gain: float | None = field(default=None, repr=False)

    @classmethod
    def from_payload(cls, payload: dict[str, Any], score: float, images: ImageStore) -> Hit:
        """Build a hit from a stored payload. Raises StoreError if it is damaged."""
        system = system_of(payload)
        columns = payload.copy()
        for name in RESERVED:
            columns.pop(name, None)
        hit = object.__new__(cls)  # `cls(…)` sets each attribute of a frozen class by a call, which takes twice as long
        attributes = vars(hit)
        attributes["id"], attributes["score"], attributes["text"] = payload["id"], score, payload.get("text")
        attributes["payload"], attributes["uri"], attributes["sha256"] = columns, system["uri"], system["sha256"]
        attributes["_images"] = images
        return hit

    def load_image(self) -> Image.Image:
        """The original image, RGB. Raises StoredImageError if it is missing or damaged."""
        return self._images.load(self.uri)

    def image_path(self) -> Path:
        """The file of the original image; with object storage, a copy in the cache of this machine.

        Raises StoredImageError if it is missing or must not be read.
        """
        return self._images.path(self.uri)

    def image_url(self, expires: int = 3600) -> str:
        """A URL by which anyone can read the original image until it expires, signed by the object storage.

        Args:
            expires: seconds, at least 1. The storage may allow fewer: S3 allows a week.

        Raises:
            OptionError: `expires` is invalid.
            StoreError: the storage signs no URLs, or has no credentials to sign with.
            StoredImageError: the image is not in the object storage.
        """
        return self._images.signed_url(self.uri, whole_number("expires", expires, at_least=1))

    def image_bytes(self) -> bytes:
        """The file of the original image, as it was added. Raises StoredImageError if it is missing."""
        return self._images.read(self.uri)

    def thumbnail_bytes(self) -> bytes:
        """The image at up to 128 px, as a WebP file. Raises StoredImageError if it is missing or damaged."""
        return self._images.thumbnail(self.sha256, self.uri)

    def to_dict(self) -> dict[str, Any]:
        """The hit for JSON: id, score, text, payload and uri; with `rerank` also rerank_score and gain."""
        hit = {"id": self.id, "score": self.score, "text": self.text, "payload": self.payload, "uri": self.uri}
        reranked = {"rerank_score": self.rerank_score, "gain": self.gain}
        return hit if self.rerank_score is None else hit | reranked

    def thumbnail(self) -> Image.Image:
        """The image at up to 128 px, RGB."""
        from unidiff_sdk._internal.images import load_image

        return load_image(self.thumbnail_bytes())

    def _repr_html_(self) -> str:
        return gallery([_hit_figure(self)])


@dataclass(frozen=True)
class Page(Sequence[Hit]):
    """The hits of one search, best first; a sequence.

    Attributes:
        hits: at most `limit` hits.
        offset: the number of better hits on earlier pages.
        limit: the requested number of hits.
        took_ms: the duration of the whole search in milliseconds, including encoding the query.
    """

    hits: tuple[Hit, ...]
    offset: int
    limit: int
    took_ms: float
    _end: Callable[[], str] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def cursor(self) -> str | None:
        """The end of this page, for `search(…, cursor=)`; None on the last page. Most searches never ask for it."""
        return None if self._end is None else self._end()

    @overload
    def __getitem__(self, index: int) -> Hit: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, index: int | slice) -> Hit | tuple[Hit, ...]:
        return self.hits[index]

    def __len__(self) -> int:
        return len(self.hits)

    def __iter__(self) -> Iterator[Hit]:
        return iter(self.hits)

    def __repr__(self) -> str:
        lines = [
            f"  {self.offset + n:>3}. {hit.score:.3f}  {hit.id!r}  {shorten(hit.text)}" for n, hit in enumerate(self, 1)
        ]
        return "\n".join([f"Page of {len(self)} hits in {self.took_ms:.1f} ms", *lines])

    def _repr_html_(self) -> str:
        return gallery([_hit_figure(hit) for hit in self])


def _hit_figure(hit: Hit) -> str:
    data = base64.b64encode(hit.thumbnail_bytes()).decode()
    return figure(
        f"data:image/webp;base64,{data}", f"<b>{hit.score:.3f}</b> {html.escape(shorten(hit.text or hit.id))}"
    )


def figure(source: str, caption: str) -> str:
    return (
        f'<figure style="margin:0;width:{THUMBNAIL_SIZE}px"><img src="{source}" style="width:100%;border-radius:6px">'
        f'<figcaption style="font:12px sans-serif">{caption}</figcaption></figure>'
    )


def gallery(figures: list[str]) -> str:
    return f'<div style="display:flex;flex-wrap:wrap;gap:10px">{"".join(figures) or "No results"}</div>'
