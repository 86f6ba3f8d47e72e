"""Image-caption pairs of a catalog. Every image is decoded once, so invalid rows are known before training starts."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from unidiff_sdk._internal.images import Fit, load_image
from unidiff_sdk.datasets.reader import EmbeddedImage, InvalidRow, Row, SpooledImage, read_catalog
from unidiff_sdk.errors import DataError, ImageError, OptionError, UniDiffError
from unidiff_sdk.inference.manifest import Resize
from unidiff_sdk.training.checkpoints.encoders.search_model import TrainableModel

from .captions import prompt_tokenizers, warn_about_long_captions
from .square_images import SquareImages, map_in_threads, to_square

__all__ = ["Pairs", "load_pairs", "require_captions"]

MEMORY_LIMIT = 2 << 30  # bytes of decoded images: about 80,000 at 64 px, or 2,000 at 512 px with CLIP's 224 px


@dataclass(frozen=True)
class Pairs:
    """The pairs of a catalog. Captions and columns are in memory, images if they fit.

    Attributes:
        images: Images for the VAE.
        clip_images: Images for CLIP.
        original_sizes: (width, height) of each image in pixels, before it became square.
        captions: Caption of each pair.
        payloads: Other columns of each pair.
        invalid_rows: Rows that were skipped.
        sha256: Digest of captions and pixels, in order.
    """

    images: SquareImages
    clip_images: SquareImages
    original_sizes: list[tuple[int, int]]
    captions: list[str]
    payloads: list[dict[str, Any]]
    invalid_rows: list[InvalidRow]
    sha256: str

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def columns(self) -> list[str]:
        """Names of the columns besides image and caption, sorted."""
        return sorted({column for payload in self.payloads for column in payload})

    def describe(self, path: str | Path) -> dict[str, Any]:
        """Provenance of the data, JSON-serializable."""
        return {
            "name": Path(path).name,
            "pairs": len(self),
            "invalid_rows": len(self.invalid_rows),
            "columns": self.columns,
            "sha256": self.sha256,
        }


def load_pairs(
    path: str | Path,
    checkpoint: TrainableModel,
    *,
    columns: Mapping[str, str | None] | None = None,
    limit: int | None = None,
    strict: bool = False,
    fit: Fit | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Pairs:
    """Read a catalog and make its images square as the runtime does.

    Args:
        path: A folder or shards, see `datasets.reader`.
        checkpoint: Provides the image sizes. Without a generator, `images` are those of the encoder.
        columns: Names of columns, see `datasets.reader.read_catalog`.
        limit: Read this many pairs at most.
        strict: Raise for the first invalid row instead of skipping it.
        fit: "crop" or "pad". Default: as the checkpoint was trained.
        memory_limit: Size, in bytes, up to which decoded images are kept in memory. Above it, none are.
        progress: Wraps the rows while they are read.

    Raises:
        DataError: The catalog is missing, or no row is valid.
        OptionError: `columns` is invalid.
    """
    require_captions(columns)
    fit = fit or checkpoint.fit
    sizes = checkpoint.image_size, int(checkpoint.clip.config.vision_config.image_size)
    resize = checkpoint.resize_for(fit)
    reader = _PairReader(sizes, fit, memory_limit, resize)
    invalid: list[InvalidRow] = []
    rows = progress(read_catalog(path, columns=columns, strict=strict, on_error=invalid.append))
    decode = partial(_decode, sizes=sizes, fit=fit, resize=resize)
    for row, decoded in map_in_threads(decode, rows, lambda row: row.nbytes):
        if len(reader.rows) == limit:
            invalid = [other for other in invalid if other.line < row.line]  # rows are read ahead
            break
        if not isinstance(decoded, UniDiffError):
            reader.add(row, decoded)
        elif strict:
            raise DataError(f"{path}, line {row.line}: {decoded}") from decoded
        else:
            invalid.append(InvalidRow(row.line, row.name, str(decoded)))
    if not reader.rows:
        reason = f"All {len(invalid)} rows are invalid. The first one: {invalid[0]}" if invalid else "It has no rows."
        raise DataError(f"{path} holds no valid image-caption pair. {reason}")
    captions = [row.text for row in reader.rows]
    tokenizers = [*prompt_tokenizers(checkpoint), checkpoint.clip_tokenizer]
    warn_about_long_captions(tokenizers, captions, path)
    return reader.pairs(sorted(invalid, key=lambda row: row.line))


def require_captions(columns: Mapping[str, str | None] | None) -> None:
    """Raise OptionError if no column is named for the captions, which training needs."""
    if columns and columns.get("text", "text") is None:
        raise OptionError("columns: training needs captions. Name the column that holds them, such as text=title.")


@dataclass(frozen=True)
class _Decoded:
    """An image: its size, (width, height), and its squares by their side."""

    size: tuple[int, int]
    squares: dict[int, Tensor]


class _PairReader:
    """Collects valid rows, their digest, and their decoded images as long as these fit in memory."""

    def __init__(self, sizes: tuple[int, int], fit: Fit, memory_limit: int, resize: Resize | None = None) -> None:
        self.sizes, self.fit, self.memory_limit, self.resize = sizes, fit, memory_limit, resize
        self.rows: list[Row] = []
        self.original_sizes: list[tuple[int, int]] = []
        self.digest = hashlib.sha256()
        self.spool: BinaryIO | None = None
        self.decoded: dict[int, list[Tensor]] | None = {size: [] for size in sizes}

    def add(self, row: Row, image: _Decoded) -> None:
        squares = image.squares
        self.rows.append(self._spooled(row))
        self.original_sizes.append(image.size)
        self.digest.update(row.text.encode() + b"\0")
        self.digest.update(squares[self.sizes[0]].numpy().tobytes())
        if self.decoded is not None:
            for size, square in squares.items():
                self.decoded[size].append(square)
            if sum(square.nbytes for square in squares.values()) * len(self.rows) > self.memory_limit:
                self.decoded = None

    def _spooled(self, row: Row) -> Row:
        """The row without an image in memory: an image of a table is kept in a temporary file."""
        if not isinstance(row.source, EmbeddedImage):
            return row
        self.spool = self.spool or tempfile.TemporaryFile()  # noqa: SIM115  # as long as rows refer to it
        try:
            offset = self.spool.seek(0, os.SEEK_END)
            self.spool.write(row.source.content)
            self.spool.flush()
        except OSError as error:
            raise DataError(
                f"the images of a table cannot be kept in {tempfile.gettempdir()}: {error.strerror}. Free space there, "
                "or set TMPDIR to another folder."
            ) from error
        return replace(row, source=SpooledImage(row.source.name, self.spool, offset, len(row.source.content)))

    def pairs(self, invalid: list[InvalidRow]) -> Pairs:
        # If both sizes are equal, both views share one tensor.
        decoded = {size: torch.stack(squares) for size, squares in (self.decoded or {}).items()}
        images, clip_images = (
            SquareImages(self.rows, size, self.fit, decoded.get(size), resize=self.resize) for size in self.sizes
        )
        captions = [row.text for row in self.rows]
        payloads = [row.payload for row in self.rows]
        return Pairs(images, clip_images, self.original_sizes, captions, payloads, invalid, self.digest.hexdigest())


def _decode(row: Row, sizes: tuple[int, ...], fit: Fit, resize: Resize | None) -> tuple[Row, _Decoded | UniDiffError]:
    try:
        image = load_image(row.image())
    except (DataError, ImageError) as error:
        return row, error
    return row, _Decoded(image.size, {size: to_square(image, size, fit, resize) for size in sizes})
