"""Texts and images to embeddings: unit vectors of one space, in which a cosine tells how well two things agree."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.images import ImageSource, load_image
from unidiff_sdk._internal.text import checked_text
from unidiff_sdk._internal.weak_method import weak_method
from unidiff_sdk.errors import BundleError, OptionError

from .bundle import Bundle
from .preprocessing import preprocess

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Encoder", "load_tokenizer", "token_ids"]

T = TypeVar("T")

_CACHED_TEXTS = 1024


class Encoder:
    """The two CLIP towers of a bundle. May be shared between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        # A bundle has a text tower of its own for search only where the generator is conditioned by another model.
        separate = bundle.has_graph("clip_text_encoder")
        self._text_graph = "clip_text_encoder" if separate else "text_encoder"
        self._tokenizer_folder = "clip_tokenizer" if separate else "tokenizer"
        self._remembered = lru_cache(maxsize=_CACHED_TEXTS)(weak_method(self._encode_alone))

    def encode_text(self, text: str) -> NDArray[np.float32]:
        """Embed one text as `encode_texts` does, and remember it: float32[dim], not to be written to.

        What many ask for is then encoded once. It never comes out of a batch, in which its last digits would depend on
        the other texts.
        """
        (text,) = _checked_texts([text])
        return self._remembered(text)

    def _encode_alone(self, text: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = self.encode_texts([text])[0]
        vector.flags.writeable = False  # shared by all who ask for the same text
        return vector

    def encode_texts(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Embed texts: float32[len(texts), dim], rows of length 1. What exceeds `bundle.max_tokens` is cut off.

        Raises:
            OptionError: `texts` is not a sequence of strings.
            BundleError: the model gives something that is not finite.
        """
        session = self.bundle.session(self._text_graph)
        batches = [
            session.run({"input_ids": token_ids(self._tokenizer, batch)}, ["text_embeds"])["text_embeds"]
            for batch in _batched(_checked_texts(texts), batch_size)
        ]
        return self._unit_rows(batches, "text")

    def encode_images(self, images: Iterable[ImageSource], batch_size: int = 32) -> NDArray[np.float32]:
        """Embed pictures of any kind that `load_image` takes: float32[number of images, dim], rows of length 1.

        Pictures are decoded one batch at a time, so that `images` may be a generator over more than fits in memory.

        Raises:
            ImageError: a picture cannot be read.
            OptionError: `images` is a single picture.
            BundleError: the model gives something that is not finite.
        """
        if isinstance(images, (str, bytes, Image.Image, Path)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise OptionError("encode_images takes several pictures; put a single one in a list")
        batches = [
            self.encode_pixels(np.stack([self.pixels(image) for image in batch]))
            for batch in _batched(images, batch_size)
        ]
        return np.concatenate(batches) if batches else np.zeros((0, self.bundle.dim), np.float32)

    def pixels(self, image: ImageSource) -> NDArray[np.float32]:
        """What the image tower takes of one picture: float32[3, size, size]. Raises ImageError."""
        bundle = self.bundle
        return preprocess(load_image(image), bundle.image_size, bundle.image_mean, bundle.image_std, bundle.image_fit)

    def encode_pixels(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed what `pixels` made, float32[number, 3, size, size], in one call: float32[number, dim], unit rows.

        Raises:
            BundleError: the model gives something that is not finite.
        """
        outputs = self.bundle.session("image_encoder").run({"pixel_values": pixels})
        return self._unit_rows([outputs["image_embeds"]], "image")

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids with start and end tokens, cut and padded to the same length: int64[len(texts), max_tokens]."""
        return token_ids(self._tokenizer, _checked_texts(texts)).reshape(len(texts), self.bundle.max_tokens)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.bundle.path / self._tokenizer_folder, self.bundle.max_tokens)

    def _unit_rows(self, batches: list[NDArray[np.float32]], kind: str) -> NDArray[np.float32]:
        if not batches:
            return np.zeros((0, self.bundle.dim), np.float32)
        rows = np.concatenate(batches).astype(np.float32, copy=False)
        if rows.shape[1] != self.bundle.dim:
            raise BundleError(
                f"{self.bundle.path}: the {kind} encoder gives {rows.shape[1]} numbers, "
                f"but the manifest says {self.bundle.dim}"
            )
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and norms.all()):
            raise BundleError(
                f"{self.bundle.path}: the {kind} encoder ({self.bundle.precision}) gives embeddings that are zero "
                "or not finite; export the bundle again, at a higher precision"
            )
        unit: NDArray[np.float32] = rows / norms
        return unit


def load_tokenizer(folder: Path, max_tokens: int) -> Tokenizer:
    """A CLIP tokenizer from its `tokenizer.json`, or else its vocabulary and merges.

    It is set to cut and pad to `max_tokens` with its own pad token.

    Raises:
        BundleError: a file is missing or damaged.
    """
    try:
        tokenizer = _read_tokenizer(folder)
        config: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BundleError(f"{folder}: the tokenizer cannot be read ({error})") from error
    pad = config.get("pad_token") or config.get("eos_token")
    pad = pad["content"] if isinstance(pad, dict) else pad  # transformers 4 writes tokens with their flags
    pad_id = tokenizer.token_to_id(pad) if isinstance(pad, str) else None
    if pad_id is None:
        raise BundleError(f"{folder}: the tokenizer has no pad token ({pad!r})")
    tokenizer.enable_truncation(max_tokens)
    tokenizer.enable_padding(length=max_tokens, pad_id=pad_id, pad_token=pad)
    return tokenizer


def _read_tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    if not (folder / "tokenizer.json").is_file() and (folder / "vocab.json").is_file():
        from .tokenizer import clip_tokenizer

        return clip_tokenizer(folder / "vocab.json", folder / "merges.txt")
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int64]:
    """int64[len(texts), max_tokens], by a tokenizer from `load_tokenizer`; at least one text."""
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(texts)], np.int64)


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise OptionError("a list of texts is needed; put a single one in a list")
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(f"texts must be strings, but one is {type(text).__name__} ({text!r})")
    return [checked_text(text) for text in texts]


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    if size < 1:
        raise OptionError(f"batch_size is {size}; give at least 1")
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
