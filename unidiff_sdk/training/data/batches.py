"""From a catalog to batches: each picture is checked and brought through the VAE once."""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unidiff_sdk._internal.images import Fit, load_image
from unidiff_sdk.datasets.reader import InvalidRow, Row, read_catalog
from unidiff_sdk.errors import DataError, ImageError, UniDiffError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.objective.joint_model import Batch, JointModel
from unidiff_sdk.training.runtime.randomness import Purpose, generator

from .feature_distillation import embed_pictures, embed_texts
from .images import Pictures, in_threads, to_square
from .latents import LatentCache, encode_latents

__all__ = ["Batches", "Choice", "Pairs", "group_keys", "load_pairs", "normalize_caption", "tokenize"]

RECORDED_CAPTIONS = 256
MEMORY = 2 << 30  # bytes of decoded pictures: some 80,000 at 64 px, 2,000 at 512 px with CLIP's 224


@dataclass(frozen=True)
class Pairs:
    """A catalog: what was written of it in memory, its pictures too if they fit.

    images: as the VAE sees them; clip_images: as CLIP sees them. sha256: over captions and pixels in their order, what
    a checkpoint says it was trained on. bad: the rows that were passed over.
    """

    images: Pictures
    clip_images: Pictures
    captions: list[str]
    payloads: list[dict[str, Any]]
    bad: list[InvalidRow]
    sha256: str

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """`sha256`"""
        return self.sha256


def recorded(captions: Sequence[str]) -> list[str]:
    """Which captions a checkpoint records, for an export to calibrate and to judge by: up to 256, from all over."""
    distinct = list(dict.fromkeys(captions))
    return distinct[:: max(1, -(-len(distinct) // RECORDED_CAPTIONS))]


def load_pairs(
    path: str | Path,
    checkpoint: Checkpoint,
    *,
    limit: int | None = None,
    strict: bool = False,
    fit: Fit | None = None,
    memory: int = MEMORY,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Pairs:
    """Read a catalog (a folder or shards, see `datasets.reader`), its pictures made square as the runtime does it.

    Every picture is decoded once, so that what cannot be used is known before anything is computed: such rows are
    collected in `bad`; with `strict`, the first one raises. limit: the first so many. fit: "crop" or "pad"; None: as
    the checkpoint was trained. memory: up to so many bytes the decoded pictures are kept, beyond that none of them is.

    Raises DataError where the folder is missing or not one row is usable.
    """
    fit = fit or checkpoint.fit
    bad: list[InvalidRow] = []
    sizes = checkpoint.image_size, int(checkpoint.clip.config.vision_config.image_size)
    kept: dict[int, list[Tensor]] | None = {size: [] for size in sizes}
    rows: list[Row] = []
    digest = hashlib.sha256()

    # 1. decode once: what is broken is told, what fits is kept
    decode = partial(_decode, sizes=sizes, fit=fit)
    found = progress(read_catalog(path, strict=strict, on_error=bad.append))
    for row, squares in in_threads(decode, found):
        if len(rows) == limit:
            bad = [other for other in bad if other.line < row.line]  # reading was ahead
            break
        if isinstance(squares, UniDiffError):
            if strict:
                raise DataError(f"{path}, line {row.line}: {squares}") from squares
            bad.append(InvalidRow(row.line, row.name, str(squares)))
            continue
        rows.append(row)
        digest.update(row.text.encode() + b"\0")
        digest.update(squares[sizes[0]].numpy().tobytes())
        if kept is not None:
            for size, square in squares.items():
                kept[size].append(square)
            if sum(square.nbytes for square in squares.values()) * len(rows) > memory:
                kept = None
    if not rows:
        why = f"all {len(bad)} rows are unusable, the first: {bad[0]}" if bad else "it has no rows"
        raise DataError(f"{path} holds no usable pair of picture and caption: {why}")

    # 2. the same squares where the sizes agree
    stacked = {size: torch.stack(squares) for size, squares in kept.items()} if kept else dict.fromkeys(sizes)
    images, clip_images = (Pictures(rows, size, fit, stacked[size]) for size in sizes)
    bad.sort(key=lambda row: row.line)
    return Pairs(images, clip_images, [r.text for r in rows], [r.payload for r in rows], bad, digest.hexdigest())


def _decode(row: Row, sizes: tuple[int, ...], fit: Fit) -> tuple[Row, dict[int, Tensor] | UniDiffError]:
    try:
        image = load_image(row.image())
    except (DataError, ImageError) as error:
        return row, error
    return row, {size: to_square(image, size, fit) for size in sizes}


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """int64[n, tokens], padded and cut to the tokenizer's length, as the diffusers pipeline does it."""
    ids: Tensor = tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def normalize_caption(caption: str) -> str:
    """What two captions must share to be equal: case, punctuation and spacing aside."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", caption.casefold()).split())


def group_keys(pairs: Pairs, columns: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """What each pair means: its values in `columns`; without columns, or where it lacks one, its normalized caption.

    Raises DataError where a column is nowhere in the data.
    """
    by_caption: list[tuple[Any, ...]] = [(normalize_caption(caption),) for caption in pairs.captions]
    if not columns:
        return by_caption
    present = {column for payload in pairs.payloads for column in payload}
    for column in columns:
        if column not in present:
            raise DataError(f"no row has the column {column!r}; the columns are {', '.join(sorted(present)) or 'none'}")
    return [
        ("columns", *(str(payload[column]) for column in columns))
        if all(payload.get(column) is not None for column in columns)
        else ("caption", *caption)
        for payload, caption in zip(pairs.payloads, by_caption, strict=True)
    ]


@dataclass(frozen=True)
class Choice:
    """Which pairs make up a step. rows: int64[m], into the data; mirror: bool[m], which pictures are mirrored."""

    rows: Tensor
    mirror: Tensor


class Batches:
    """The pairs of every step, epoch after epoch in a new order. What a step gets follows from its number alone.

    size: pairs a step, m; fewer where the data has fewer. flip: mirror half of the pictures. cache: of latents.
    clip_ids: see `Batch`. leash: remember what the model, which is still the base, makes of every pair. scratch: a
    folder for what does not fit in memory, see `rows`.
    """

    def __init__(
        self,
        model: JointModel,
        pairs: Pairs,
        input_ids: Tensor,
        groups: Sequence[Any],
        *,
        size: int,
        flip: bool,
        seed: int,
        cache: LatentCache | None = None,
        clip_ids: Tensor | None = None,
        leash: bool = False,
        scratch: Path | None = None,
    ) -> None:
        self.clip_images = pairs.clip_images
        self.latents = encode_latents(model, pairs.images, cache, scratch=scratch)
        # A mirrored picture's latents are not the mirrored latents: both are encoded.
        mirrored = pairs.images.mirrored() if flip else None
        self.mirrored = encode_latents(model, mirrored, cache, scratch=scratch) if mirrored else None
        self.input_ids = input_ids
        self.clip_ids = clip_ids
        numbers = {key: number for number, key in enumerate(dict.fromkeys(groups))}
        self.groups = torch.tensor([numbers[key] for key in groups])
        self.size = min(size, len(pairs))
        self.seed = seed
        self.model = model
        self.base: dict[str, Tensor] = {}
        if leash:
            self.base["u"] = embed_pictures(model, pairs.clip_images, scratch)
            self.base["v"] = embed_texts(model, input_ids if clip_ids is None else clip_ids, scratch)
            if flip:
                self.base["u mirrored"] = embed_pictures(model, pairs.clip_images.mirrored(), scratch)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w)"""
        return tuple(self.latents.shape[1:])

    def choose(self, step: int) -> Choice:
        """The pairs of a step, counted from 0; those left over at an epoch's end wait for the next."""
        epoch, place = divmod(step, len(self.latents) // self.size)
        order = torch.randperm(len(self.latents), generator=generator(self.seed, Purpose.ORDER, epoch))
        rows = order[place * self.size : (place + 1) * self.size]
        if self.mirrored is None:
            return Choice(rows, torch.zeros(len(rows), dtype=torch.bool))
        return Choice(rows, torch.rand(len(rows), generator=generator(self.seed, Purpose.MIRROR, step)) < 0.5)

    def load(self, choice: Choice, samples: int) -> Batch:
        """The batch of these pairs, the first `samples` of them with latents, on the model's device."""
        device = self.model.alpha_bar.device
        rows, mirror = choice.rows, choice.mirror[:, None, None, None]
        pixels, latents = self.clip_images[rows], self.latents[rows[:samples]]
        if self.mirrored is not None:
            pixels = torch.where(mirror, pixels.flip(-1), pixels)
            latents = torch.where(mirror[:samples], self.mirrored[rows[:samples]], latents)
        return Batch(
            clip_pixels=self.model.to_clip(pixels.to(device).float() / 255),
            latents=latents.to(device),
            input_ids=self.input_ids[rows].to(device),
            groups=self.groups[rows].to(device),
            clip_ids=None if self.clip_ids is None else self.clip_ids[rows].to(device),
            base={name: embeddings.to(device) for name, embeddings in self._base_of(choice).items()},
        )

    def _base_of(self, choice: Choice) -> dict[str, Tensor]:
        of = {name: embeddings[choice.rows] for name, embeddings in self.base.items()}
        if (mirrored := of.pop("u mirrored", None)) is not None:
            of["u"] = torch.where(choice.mirror[:, None], mirrored, of["u"])
        return of
