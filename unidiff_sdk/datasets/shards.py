"""Read webdataset shards: uncompressed tar files in which files with the same name, up to its first dot, form a sample.

    shop-000.tar
        0001.jpg        the image: .jpg, .jpeg, .png, .webp, .gif, .avif, .tif, .tiff, .bmp or .ppm
        0001.txt        the caption; without it, "text" or "caption" in the .json
        0001.json       the other columns: {"price": 79.0, "brand": "Acme"}
        0002.jpg        the next sample

The files of a sample must be consecutive. Other extensions are ignored. Nothing is unpacked: an image is a position in
its shard and is read from there on demand, in any order.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import open_regular_file
from unidiff_sdk._internal.images import MAX_FILE_SIZE
from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.errors import DataError

__all__ = ["Member", "Sample", "count_samples", "find_shards", "read_shards"]

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "avif", "tif", "tiff", "bmp", "ppm")
CAPTION, COLUMNS = "txt", "json"
MAX_TEXT_SIZE = 1 << 20  # bytes of a caption or of the columns, because a shard can come from an untrusted source


_MAX_READ = MAX_TEXT_SIZE + tarfile.BLOCKSIZE

# What tarfile raises on damaged headers, besides its own errors.
_DAMAGE = (ValueError, OverflowError, MemoryError, RecursionError, EOFError, LookupError)


class _ShardFile(io.BufferedReader):
    """A shard for tarfile, which believes the sizes in headers: a header of 64 GB would take as much memory."""

    def __init__(self, path: Path) -> None:
        open_regular_file(path, DataError).close()
        super().__init__(io.FileIO(path))

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(_MAX_READ if size is None or size < 0 else min(size, _MAX_READ))


@dataclass(frozen=True)
class Member:
    """A file in a shard: `size` bytes at `offset`."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the content. Raises DataError if the shard is missing or has become shorter."""
        if self.size > MAX_FILE_SIZE:
            raise DataError(f"{self.name} has {self.size:,} bytes; at most {MAX_FILE_SIZE:,} are allowed")
        try:
            with open_regular_file(self.shard, DataError) as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.shard}: cannot be read ({error.strerror})") from error
        if len(content) != self.size:
            raise DataError(
                f"{self.shard}: the shard changed while it was read and no longer contains {self.name}. Read it again."
            )
        return content


@dataclass(frozen=True)
class Sample:
    """One sample of a shard, valid or not.

    Attributes:
        name: the shard and the name of the sample.
        image: the image; None if the sample is invalid.
        columns: the columns; `text` is the caption.
        problem: what is wrong with an invalid sample.
        hides_later_rows: whether the rest of the shard could not be read.
    """

    name: str
    image: Member | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    hides_later_rows: bool = False


def find_shards(path: str | Path) -> list[Path]:
    """The shards at a path, sorted by name: the file itself, or every `.tar` in the folder."""
    path = Path(path)
    if path.suffix == ".tar" and path.is_file():
        return [path]
    return sorted(file for file in path.glob("*.tar") if file.is_file())


def read_shards(shards: Sequence[Path]) -> Iterator[Sample]:
    """Iterate over the samples of each shard in order.

    An invalid sample has a `problem`. A damaged shard ends with such a sample, and the next shard follows.

    Raises:
        DataError: a shard is not an uncompressed tar file.
    """
    for shard in shards:
        try:
            with _ShardFile(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                yield from _samples(shard, tar)
        except (tarfile.TarError, *_DAMAGE) as error:
            raise DataError(
                f"{shard}: not an uncompressed tar file ({error}). If it is a .tar.gz, decompress it first."
            ) from error
        except OSError as error:
            raise DataError(f"{shard}: cannot be read ({error.strerror})") from error


def count_samples(shards: Sequence[Path]) -> int:
    """Count the samples of the shards, valid and invalid. Raises DataError as `read_shards` does."""
    return sum(1 for _ in read_shards(shards))


def _samples(shard: Path, tar: tarfile.TarFile) -> Iterator[Sample]:
    damage: list[str] = []
    for name, members in groupby(_members(tar, damage), key=lambda member: _split(member.name)[0]):
        yield _sample(shard, tar, f"{shard.name}/{name}", list(members))
    if damage:
        problem = f"the shard is damaged and the rest of it is skipped ({damage[0]})"
        yield Sample(shard.name, problem=problem, hides_later_rows=True)


def _members(tar: tarfile.TarFile, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """The regular files with a name and an extension, up to the first damage, which is appended to `damage`."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
            if member.isfile() and not member.issparse() and all(_split(member.name)):
                yield member
        # At an invalid header, tarfile stops as if the archive ended there.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            damage.append(f"no header at byte {tar.offset:,}")
    except (tarfile.TarError, *_DAMAGE) as error:
        if tar.offset == 0:
            raise
        damage.append(str(error) or type(error).__name__)


def _split(name: str) -> tuple[str, str]:
    """Split at the first dot of the file name: the name of the sample, and the extension in lower case."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return (f"{folder}{slash}{stem}", extension.lower()) if stem else ("", "")


def _sample(shard: Path, tar: tarfile.TarFile, name: str, members: list[tarfile.TarInfo]) -> Sample:
    by_extension = {_split(member.name)[1]: member for member in members}
    images = [by_extension[extension] for extension in IMAGES if extension in by_extension]
    if len(images) != 1:
        return Sample(
            name, problem=f"the sample has {len(images)} images instead of one ({', '.join(sorted(by_extension))})"
        )
    columns: dict[str, Any] = {}
    try:
        if COLUMNS in by_extension:
            columns = parse_json(_text(tar, by_extension[COLUMNS]), "the .json", nan=True, unique_keys=True)
        if CAPTION in by_extension:
            columns["text"] = _text(tar, by_extension[CAPTION])
    except UnicodeDecodeError as error:
        return Sample(name, problem=f"the text is not UTF-8 ({error})")
    except DataError as error:
        return Sample(name, problem=str(error))
    if "text" not in columns and "caption" in columns:
        columns["text"] = columns.pop("caption")
    return Sample(name, Member(shard, images[0].name, images[0].offset_data, images[0].size), columns)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT_SIZE:
        raise DataError(f"{member.name} has {member.size:,} bytes; at most {MAX_TEXT_SIZE:,} are allowed")
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read().decode("utf-8-sig")
