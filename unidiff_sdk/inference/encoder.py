"""Texts and images to embeddings: unit vectors of one space, in which the cosine measures how well two match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.images import ImageSource, load_image
from unidiff_sdk._internal.json_values import checked_text, whole_number
from unidiff_sdk._internal.lifetimes import weak_method
from unidiff_sdk._internal.parallel import batched
from unidiff_sdk.errors import BundleError, OptionError

from .bundle import Bundle
from .folder.files import BundleFiles
from .preprocessing import preprocess, preprocess_patches
from .tokenizer import clip_tokenizer, tokenizer_errors

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

__all__ = ["Encoder", "cut_text", "load_tokenizer", "token_ids"]

CACHED_TEXTS = 1024
CHARACTERS_PER_TOKEN = 128  # far more than a token stands for, whatever the language


class Encoder:
    """The text encoder and the image encoder of a bundle. May be shared between threads."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        # Search has its own text encoder only where another model conditions the UNet.
        separate = bundle.has_graph("clip_text_encoder")
        self._text_graph = "clip_text_encoder" if separate else "text_encoder"
        self._tokenizer_folder = "clip_tokenizer" if separate else "tokenizer"
        self._cached = lru_cache(maxsize=CACHED_TEXTS)(weak_method(self._encode_alone))
        self._tokens = lru_cache(maxsize=CACHED_TEXTS)(weak_method(self._tokenize_alone))

    @property
    def graphs(self) -> tuple[str, str]:
        """The text encoder and the image encoder."""
        return self._text_graph, "image_encoder"

    def encode_text(self, text: str) -> NDArray[np.float32]:
        """Embed one text, and cache it: float32[dim], a read-only unit vector.

        The text is encoded alone: in a batch, the last digits of an embedding would depend on the other texts.

        Raises:
            OptionError: `text` is not a string.
            BundleError: the embedding is not finite.
        """
        (text,) = _checked_texts([text])
        return self._cached(text)

    def _encode_alone(self, text: str) -> NDArray[np.float32]:
        outputs = self.bundle.session(self._text_graph).run({"input_ids": self._tokens(text)[0]}, ["text_embeds"])
        embedding: NDArray[np.float32] = self._unit_vectors([outputs["text_embeds"]], "text")[0]
        embedding.flags.writeable = False  # shared by all that use the same text
        return embedding

    def _tokenize_alone(self, text: str) -> tuple[NDArray[np.int64], bool]:
        """Token ids of one text, int64[1, max_tokens], and whether it has more. A search needs both."""
        (encoding,) = _encodings(self._tokenizer, [text])
        return np.array([encoding.ids], np.int64), bool(encoding.overflowing)

    def encode_texts(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Embed texts: float32[len(texts), dim], unit vectors. Tokens beyond `bundle.max_tokens` are ignored.

        Raises:
            OptionError: `texts` is not a sequence of strings.
            BundleError: an embedding is not finite.
        """
        session = self.bundle.session(self._text_graph)
        batches = [
            session.run({"input_ids": token_ids(self._tokenizer, batch)}, ["text_embeds"])["text_embeds"]
            for batch in batched(_checked_texts(texts), whole_number("batch_size", batch_size, at_least=1))
        ]
        return self._unit_vectors(batches, "text")

    def encode_images(self, images: Iterable[ImageSource], batch_size: int = 32) -> NDArray[np.float32]:
        """Embed images of any kind that `load_image` reads: float32[number of images, dim], unit vectors.

        Images are decoded one batch at a time, so `images` may be a generator over more than fits into memory.

        Raises:
            ImageError: an image cannot be read.
            OptionError: `images` is a single image.
            BundleError: an embedding is not finite.
        """
        if isinstance(images, (str, bytes, Image.Image, Path)) or (isinstance(images, np.ndarray) and images.ndim < 4):
            raise OptionError("encode_images needs several images; put a single one in a list")
        batches = [
            self.encode_pixels(np.stack([self.pixels(image) for image in batch]))
            for batch in batched(images, whole_number("batch_size", batch_size, at_least=1))
        ]
        return np.concatenate(batches) if batches else np.zeros((0, self.bundle.dim), np.float32)

    def pixels(self, image: ImageSource) -> NDArray[np.float32]:
        """One image as the image encoder takes it: float32[3, size, size], or see `preprocess_patches`.

        Raises ImageError.
        """
        bundle = self.bundle
        if (patches := bundle.image_patches) is not None:
            return preprocess_patches(load_image(image), bundle.image_mean, bundle.image_std, patches)
        size, mean, std = bundle.image_size, bundle.image_mean, bundle.image_std
        return preprocess(load_image(image), size, mean, std, bundle.image_fit, bundle.image_resize)

    def encode_pixels(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed a stack of what `pixels` returns, in one call: float32[number, dim], unit vectors.

        Raises:
            BundleError: an embedding is not finite.
        """
        feeds: dict[str, NDArray[Any]] = {"pixel_values": pixels}
        if self.bundle.image_patches is not None:
            shapes = pixels[..., -2:]
            feeds = {
                "pixel_values": pixels[..., :-2],
                "pixel_attention_mask": (shapes[..., 0] > 0).astype(np.int32),
                "spatial_shapes": shapes[:, 0].astype(np.int64),
            }
        outputs = self.bundle.session("image_encoder").run(feeds)
        return self._unit_vectors([outputs["image_embeds"]], "image")

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Token ids with start and end tokens, truncated and padded: int64[len(texts), max_tokens]."""
        return token_ids(self._tokenizer, _checked_texts(texts)).reshape(len(texts), self.bundle.max_tokens)

    def too_long(self, texts: Sequence[str]) -> list[str]:
        """The texts with more than `bundle.max_tokens` tokens, whose ends are ignored."""
        # A token has at least one byte, so most queries need no tokenizer here. Two tokens mark start and end.
        long = [text for text in texts if len(text.encode()) + 2 > self.bundle.max_tokens]
        if len(long) == 1:
            return long if self._tokens(long[0])[1] else []
        encodings = _encodings(self._tokenizer, long) if long else []
        return [text for text, encoding in zip(long, encodings, strict=True) if encoding.overflowing]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.bundle.files.part(self._tokenizer_folder), self.bundle.max_tokens)

    def _unit_vectors(self, batches: list[NDArray[np.float32]], kind: str) -> NDArray[np.float32]:
        if not batches:
            return np.zeros((0, self.bundle.dim), np.float32)
        embeddings = np.concatenate(batches).astype(np.float32, copy=False)
        if embeddings.shape[1] != self.bundle.dim:
            raise BundleError(
                f"{self.bundle.path}: the {kind} encoder returns embeddings of {embeddings.shape[1]} dimensions, but "
                f"the manifest states {self.bundle.dim}; export the bundle again"
            )
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        if not (np.isfinite(norms).all() and norms.all()):
            raise BundleError(
                f"{self.bundle.path}: the {kind} encoder ({self.bundle.precision}) returns embeddings that are zero or "
                "not finite; export the bundle again at a higher precision"
            )
        unit: NDArray[np.float32] = embeddings / norms
        return unit


def load_tokenizer(folder: Path | BundleFiles, max_tokens: int) -> Tokenizer:
    """A CLIP tokenizer from its `tokenizer.json`, or else from its vocabulary and merges.

    It truncates and pads to `max_tokens` with its own pad token, which is a special token also within a text, as
    transformers has it.

    Raises:
        BundleError: a file is missing or damaged.
    """
    files = folder if isinstance(folder, BundleFiles) else BundleFiles(folder)
    with tokenizer_errors(files.folder):
        tokenizer = _read_tokenizer(files)
        config = files.read_json("tokenizer_config.json")
    if "special_tokens_map.json" in files and "added_tokens_decoder" not in config:  # transformers 4 reads it first
        config |= files.read_json("special_tokens_map.json")
    if config.get("padding_side", "right") != "right":
        raise BundleError(
            f"{folder}: the tokenizer pads on the {config['padding_side']!r} side, but CLIP needs padding on the "
            "'right'; export a model with CLIP's tokenizer"
        )
    pad = config.get("pad_token") or config.get("eos_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad  # transformers 4 writes tokens with their flags
    pad_id = tokenizer.token_to_id(pad) if isinstance(pad, str) else None
    if pad_id is None:
        raise BundleError(f"{files.folder}: the tokenizer has no pad token ({pad!r}); export the bundle again")
    with tokenizer_errors(files.folder):
        if not tokenizer.get_added_tokens_decoder().get(pad_id):  # its own flags stay
            tokenizer.add_special_tokens([pad])
        tokenizer.enable_truncation(max_tokens)
        tokenizer.enable_padding(length=max_tokens, pad_id=pad_id, pad_token=pad)
        lengths = {len(encoding.ids) for encoding in tokenizer.encode_batch(["", "a " * max_tokens])}
    if lengths != {max_tokens}:
        raise BundleError(
            f"{files.folder}: the tokenizer returns {max(lengths)} tokens where the manifest states {max_tokens}; "
            "export the bundle again"
        )
    return tokenizer


def _read_tokenizer(files: BundleFiles) -> Tokenizer:
    from tokenizers import Tokenizer

    if "tokenizer.json" not in files and "vocab.json" in files:
        return clip_tokenizer(files.read_json("vocab.json"), files.read("merges.txt").decode("utf-8"))
    return Tokenizer.from_str(files.read("tokenizer.json").decode("utf-8"))


def token_ids(tokenizer: Tokenizer, texts: list[str]) -> NDArray[np.int64]:
    """int64[len(texts), max_tokens], by a tokenizer from `load_tokenizer`. At least one text."""
    return np.array([encoding.ids for encoding in _encodings(tokenizer, texts)], np.int64)


def _encodings(tokenizer: Tokenizer, texts: list[str]) -> list[Encoding]:
    assert tokenizer.truncation is not None  # `load_tokenizer` enables it
    max_tokens = int(tokenizer.truncation["max_length"])
    with tokenizer_errors("bundle"):
        encodings: list[Encoding] = tokenizer.encode_batch([cut_text(text, max_tokens) for text in texts])
    return encodings


def cut_text(text: str, max_tokens: int) -> str:
    """The start of a text, with more characters than `max_tokens` tokens hold. A short text is returned as it is.

    Tokenizing a million characters takes seconds, although all but the first tokens are then ignored. Runs of spaces,
    which add no tokens, are shortened first.
    """
    longest = CHARACTERS_PER_TOKEN * max_tokens
    return text if len(text) <= longest else " ".join(text.split())[:longest]


def _checked_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise OptionError("a list of texts is needed; put a single one in a list")
    for text in texts:
        if not isinstance(text, str):
            raise OptionError(f"texts must be strings, but one is {type(text).__name__} ({text!r:.60})")
    return [checked_text(text) for text in texts]
