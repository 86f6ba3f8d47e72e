"""From a catalogue folder to batches: each picture is decoded and brought through the VAE once, then kept in memory."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unidiff_sdk.datasets.reader import BadRow, Row, read_catalogue
from unidiff_sdk.errors import DataError, ImageError
from unidiff_sdk.images import load_image, preprocess
from unidiff_sdk.training.checkpoint import Checkpoint
from unidiff_sdk.training.model import Batch, JointModel

__all__ = ["Batches", "Pairs", "encode_latents", "group_keys", "load_pairs", "normalise_caption", "tokenise"]

ENCODE_BATCH = 16
_ZERO, _ONE = np.zeros(3, np.float32), np.ones(3, np.float32)


@dataclass(frozen=True)
class Pairs:
    """A catalogue in memory.

    images: uint8[n, 3, size, size], as the VAE sees them; clip_images: uint8[n, 3, s, s], as CLIP sees them (the same
    tensor where the sizes agree). bad: the rows that were passed over.
    """

    images: Tensor
    clip_images: Tensor
    captions: list[str]
    payloads: list[dict[str, Any]]
    bad: list[BadRow]

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """sha256 over captions and pixels in their order: what a checkpoint says it was trained on."""
        digest = hashlib.sha256()
        for caption, image in zip(self.captions, self.images, strict=True):
            digest.update(caption.encode() + b"\0")
            digest.update(image.numpy().tobytes())
        return digest.hexdigest()


def load_pairs(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    limit: int | None = None,
    strict: bool = False,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Pairs:
    """Read a catalogue folder: shorter edge to the model's size, centre crop, both as the runtime does it.

    Rows that cannot be used are collected in `bad`; with `strict`, the first one raises. `limit`: the first so many.
    Raises DataError where the folder is missing or not one row is usable.
    """
    bad: list[BadRow] = []
    sizes = checkpoint.image_size, int(checkpoint.clip.config.vision_config.image_size)
    squares: dict[int, list[Tensor]] = {size: [] for size in sizes}
    captions: list[str] = []
    payloads: list[dict[str, Any]] = []
    for row in progress(read_catalogue(folder, strict=strict, on_error=bad.append)):
        if limit is not None and len(captions) == limit:
            break
        try:
            image = load_image(row.path)
        except ImageError as error:
            if strict:
                raise DataError(f"{folder}, line {row.line}: {error}") from error
            bad.append(BadRow(row.line, row.path.name, str(error)))
            continue
        for size, into in squares.items():
            pixels = preprocess(image, size, _ZERO, _ONE)
            into.append(torch.from_numpy(np.rint(pixels * 255).astype(np.uint8)))
        captions.append(row.text)
        payloads.append(row.payload)
    if not captions:
        why = f"all {len(bad)} rows are unusable, the first: {bad[0]}" if bad else "its metadata has no rows"
        raise DataError(f"{folder} holds no usable pair of picture and caption: {why}")
    images, clip_images = (torch.stack(squares[size]) for size in sizes)
    return Pairs(images, clip_images if sizes[0] != sizes[1] else images, captions, payloads, bad)


def tokenise(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """int64[n, tokens], padded and cut to the tokenizer's length, as the diffusers pipeline does it."""
    ids: Tensor = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def normalise_caption(caption: str) -> str:
    """What two captions must share to be equal: case, punctuation and spacing aside."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", caption.casefold()).split())


def group_keys(pairs: Pairs, columns: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """What each pair means: its values in `columns`, or without columns its normalised caption.

    Raises DataError where a column is nowhere in the data.
    """
    if not columns:
        return [(normalise_caption(caption),) for caption in pairs.captions]
    present = {column for payload in pairs.payloads for column in payload}
    for column in columns:
        if column not in present:
            raise DataError(f"no row has the column {column!r}; the columns are {', '.join(sorted(present)) or 'none'}")
    return [tuple(str(payload.get(column)) for column in columns) for payload in pairs.payloads]


@torch.no_grad()
def encode_latents(model: JointModel, images: Tensor) -> Tensor:
    """uint8[n, 3, h, w] -> float[n, c, h/f, w/f] on the CPU, scaled as the UNet sees them."""
    device = model.alpha_bar.device
    rows = [model.encode(chunk.to(device).float() / 255).cpu() for chunk in images.split(ENCODE_BATCH)]
    return torch.cat(rows)


class Batches:
    """An endless, shuffled stream of batches that follows from its seed alone."""

    def __init__(
        self, model: JointModel, pairs: Pairs, input_ids: Tensor, groups: Sequence[Any], *, size: int, flip: bool
    ) -> None:
        self.clip_images = pairs.clip_images
        self.latents = encode_latents(model, pairs.images)
        # A mirrored picture's latents are not the mirrored latents: both are encoded.
        self.mirrored = encode_latents(model, pairs.images.flip(-1)) if flip else None
        self.input_ids = input_ids
        numbers = {key: number for number, key in enumerate(dict.fromkeys(groups))}
        self.groups = torch.tensor([numbers[key] for key in groups])
        self.size = min(size, len(pairs))
        self.model = model

    def stream(self, generator: torch.Generator) -> Iterator[Batch]:
        """Epoch after epoch in a new order; the pairs left over at an epoch's end wait for the next."""
        while True:
            order = torch.randperm(len(self.latents), generator=generator)
            for rows in order[: len(order) // self.size * self.size].split(self.size):
                yield self._batch(rows, generator)

    def _batch(self, rows: Tensor, generator: torch.Generator) -> Batch:
        device = self.model.alpha_bar.device
        pixels, latents = self.clip_images[rows], self.latents[rows]
        if self.mirrored is not None:
            mirror = (torch.rand(len(rows), generator=generator) < 0.5)[:, None, None, None]
            pixels = torch.where(mirror, pixels.flip(-1), pixels)
            latents = torch.where(mirror, self.mirrored[rows], latents)
        return Batch(
            clip_pixels=self.model.to_clip(pixels.to(device).float() / 255),
            latents=latents.to(device),
            input_ids=self.input_ids[rows].to(device),
            groups=self.groups[rows].to(device),
        )
