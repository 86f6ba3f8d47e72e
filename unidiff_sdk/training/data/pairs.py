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
from PIL import Image
from torch import Tensor

from unidiff_sdk._internal.images import Fit, load_image
from unidiff_sdk.datasets.reader import EmbeddedImage, InvalidRow, Row, SpooledImage, read_catalog
from unidiff_sdk.errors import DataError, ImageError, OptionError, UniDiffError
from unidiff_sdk.inference.manifest import Resize
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.checkpoints.encoders.search_model import TrainableModel

from .buckets import Size, bucket_sizes, nearest_bucket
from .captions import prompt_tokenizers, warn_about_long_captions
from .fitted_images import FittedImages, fit_to, map_in_threads

__all__ = ["Bucket", "Pairs", "load_pairs", "require_captions"]

MEMORY_LIMIT = 2 << 30  # bytes of decoded images: about 80,000 at 64 px, or 2,000 at 512 px with CLIP's 224 px


@dataclass(frozen=True)
class Bucket:
    """The pairs whose images have one size.

    Attributes:
        rows: int64[k], rows of the pairs.
        images: The k images.
    """

    rows: Tensor
    images: FittedImages


@dataclass(frozen=True)
class Pairs:
    """The pairs of a catalog. Captions and columns are in memory, images if they fit.

    Attributes:
        buckets: Images for the VAE, by their size. Usually one bucket of squares.
        clip_images: Images for CLIP.
        original_sizes: (width, height) of each image in pixels, as it was read.
        captions: Caption of each pair.
        payloads: Other columns of each pair.
        invalid_rows: Rows that were skipped.
        sha256: Digest of captions and pixels, in order.
    """

    buckets: list[Bucket]
    clip_images: FittedImages
    original_sizes: list[Size]
    captions: list[str]
    payloads: list[dict[str, Any]]
    invalid_rows: list[InvalidRow]
    sha256: str

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def images(self) -> FittedImages:
        """Images for the VAE, if all have one size."""
        (bucket,) = self.buckets
        return bucket.images

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
            **({"buckets": self._counts()} if len(self.buckets) > 1 else {}),
        }

    def _counts(self) -> dict[str, int]:
        """Number of images of each size."""
        sizes = {bucket.images.size: len(bucket.rows) for bucket in self.buckets}
        return {f"{width} x {height}": count for (width, height), count in sizes.items()}


def load_pairs(
    path: str | Path,
    checkpoint: TrainableModel,
    *,
    columns: Mapping[str, str | None] | None = None,
    limit: int | None = None,
    strict: bool = False,
    fit: Fit | None = None,
    aspect_buckets: bool = False,
    memory_limit: int = MEMORY_LIMIT,
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Pairs:
    """Read a catalog and bring its images to the sizes that the model is trained at.

    Args:
        path: A folder or shards, see `datasets.reader`.
        checkpoint: Provides the image sizes. Without a generator, `images` are those of the encoder.
        columns: Names of columns, see `datasets.reader.read_catalog`.
        limit: Read this many pairs at most.
        strict: Raise for the first invalid row instead of skipping it.
        fit: "crop" or "pad". Default: as the checkpoint was trained.
        aspect_buckets: Instead of squares, make rectangles of the size whose aspect ratio is nearest to the image's.
        memory_limit: Size, in bytes, up to which decoded images are kept in memory. Above it, none are.
        progress: Wraps the rows while they are read.

    Raises:
        DataError: The catalog is missing, or no row is valid.
        OptionError: `columns` is invalid, or aspect_buckets is set for a checkpoint that was trained on padded squares
            or has no positions for such images.
    """
    require_captions(columns)
    fit = fit or checkpoint.fit
    views = _Views.of(checkpoint, fit, aspect_buckets=aspect_buckets)
    reader = _PairReader(views, memory_limit)
    invalid: list[InvalidRow] = []
    rows = progress(read_catalog(path, columns=columns, strict=strict, on_error=invalid.append))
    for row, decoded in map_in_threads(partial(_decode, views=views), rows, lambda row: row.nbytes):
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
class _Views:
    """What each image is made into: one image for CLIP, and one for the VAE, whose size is that of its bucket."""

    clip: Size
    buckets: list[Size]
    fit: Fit
    resize: Resize | None

    @classmethod
    def of(cls, checkpoint: TrainableModel, fit: Fit, *, aspect_buckets: bool) -> _Views:
        side = checkpoint.image_size
        clip_side = int(checkpoint.clip.config.vision_config.image_size)
        if aspect_buckets and fit == "pad":
            raise OptionError(
                "aspect_buckets crops images to rectangles, but the base was trained on padded squares. Set fit to "
                '"crop", or omit aspect_buckets.'
            )
        buckets = [(side, side)]
        if aspect_buckets and isinstance(checkpoint, Checkpoint):
            buckets = bucket_sizes(side, checkpoint.block)
            longest, largest = max(map(max, buckets)), checkpoint.largest_side
            if largest is not None and longest > largest:
                raise OptionError(
                    f"aspect_buckets makes images with sides of up to {longest} pixels, but the transformer of "
                    f"{checkpoint.path} has positions for at most {largest}. Omit aspect_buckets."
                )
        return cls((clip_side, clip_side), buckets, fit, checkpoint.resize_for(fit))

    def make(self, image: Image.Image) -> _Decoded:
        bucket = nearest_bucket(image.size, self.buckets)
        sizes = {self.clip, bucket}
        return _Decoded(image.size, bucket, {size: fit_to(image, size, self.fit, self.resize) for size in sizes})


@dataclass(frozen=True)
class _Decoded:
    """An image: (width, height) as it was read, the size of its bucket, and its views by their size."""

    size: Size
    bucket: Size
    views: dict[Size, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(view.nbytes for view in self.views.values())


class _PairReader:
    """Collects valid rows, their digest, and their decoded images as long as these fit in memory."""

    def __init__(self, views: _Views, memory_limit: int) -> None:
        self.views, self.memory_left = views, memory_limit
        self.rows: list[Row] = []
        self.original_sizes: list[Size] = []
        self.members: dict[Size, list[int]] = {size: [] for size in views.buckets}
        self.digest = hashlib.sha256()
        self.spool: BinaryIO | None = None
        self.decoded: list[_Decoded] | None = []

    def add(self, row: Row, image: _Decoded) -> None:
        self.members[image.bucket].append(len(self.rows))
        self.rows.append(self._spooled(row))
        self.original_sizes.append(image.size)
        self.digest.update(row.text.encode() + b"\0")
        self.digest.update(image.views[image.bucket].numpy().tobytes())
        self.memory_left -= image.nbytes
        if self.memory_left < 0:
            self.decoded = None
        if self.decoded is not None:
            self.decoded.append(image)

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
        clip_images = self._images(self.views.clip, list(range(len(self.rows))))
        buckets = []
        for size, members in self.members.items():
            # If all views have one size, they share one tensor.
            shared = size == self.views.clip and len(members) == len(self.rows)
            images = clip_images if shared else self._images(size, members)
            if members:
                buckets.append(Bucket(torch.tensor(members), images))
        captions = [row.text for row in self.rows]
        payloads = [row.payload for row in self.rows]
        return Pairs(buckets, clip_images, self.original_sizes, captions, payloads, invalid, self.digest.hexdigest())

    def _images(self, size: Size, members: list[int]) -> FittedImages:
        """The images of some rows at a size that all of them have."""
        rows = [self.rows[number] for number in members]
        decoded = None
        if self.decoded is not None and members:
            decoded = torch.stack([self.decoded[number].views[size] for number in members])
        return FittedImages(rows, size, self.views.fit, decoded, resize=self.views.resize)


def _decode(row: Row, views: _Views) -> tuple[Row, _Decoded | UniDiffError]:
    try:
        image = load_image(row.image())
    except (DataError, ImageError) as error:
        return row, error
    return row, views.make(image)
