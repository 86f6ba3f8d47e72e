"""Read webdataset shards: tar files in which consecutive members of one name, up to its first dot, are one sample.

`0001.jpg`, `0001.txt`, `0001.json` make a picture, its caption and its other columns. Nothing is unpacked: a picture is
a place in its shard, and is read from there when it is wanted, in any order.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from unidiff_sdk.errors import DataError

__all__ = ["Member", "Sample", "count_samples", "find_shards", "read_shards"]

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTION, COLUMNS = "txt", "json"
LONGEST_TEXT = 1 << 20  # bytes of a caption or of columns; a shard may come from anyone


@dataclass(frozen=True)
class Member:
    """A file inside a shard: `size` bytes from `offset` on."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its content. Raises DataError if the shard is gone or has become shorter."""
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.shard}: cannot be read ({error.strerror})") from error
        if len(content) != self.size:
            raise DataError(f"{self.shard}: was changed since it was opened; {self.name} is no longer in it")
        return content


@dataclass(frozen=True)
class Sample:
    """What a shard holds under one name: a picture and columns, of which `text` is the caption; or what is wrong."""

    name: str
    image: Member | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    problem: str = ""
    hides_later_rows: bool = False  # it stands for all that would have followed


def find_shards(path: str | Path) -> list[Path]:
    """The shards at a path, in the order of their names: the file itself, or every .tar of a folder; none if none."""
    path = Path(path)
    if path.suffix == ".tar" and path.is_file():
        return [path]
    return sorted(file for file in path.glob("*.tar") if file.is_file())


def read_shards(shards: Sequence[Path]) -> Iterator[Sample]:
    """The samples of each shard in order. What is broken is a sample with a `problem`; a damaged shard ends with one.

    Members with other endings than `.jpg`, `.jpeg`, `.png`, `.webp`, `.txt` and `.json` are passed over. The caption is
    the `.txt`, else `text`, else `caption` in the `.json`.

    Raises:
        DataError: a shard is not an uncompressed tar file.
    """
    for shard in shards:
        try:
            with tarfile.open(shard, "r:") as tar:
                yield from _samples(shard, tar)
        except tarfile.ReadError as error:
            raise DataError(
                f"{shard}: is not a tar file that can be read in place ({error}). Shards are plain .tar: decompress "
                "a .tar.gz first"
            ) from error
        except OSError as error:
            raise DataError(f"{shard}: cannot be read ({error.strerror})") from error


def count_samples(shards: Sequence[Path]) -> int:
    """How many samples the shards have, good and bad. Raises DataError as `read_shards` does."""
    return sum(1 for _ in read_shards(shards))


def _samples(shard: Path, tar: tarfile.TarFile) -> Iterator[Sample]:
    damage: list[str] = []
    for name, members in groupby(_members(tar, damage), key=lambda member: _split(member.name)[0]):
        yield _sample(shard, tar, f"{shard.name}/{name}", list(members))
    if damage:
        problem = f"the shard is damaged, and what follows is lost ({damage[0]})"
        yield Sample(shard.name, problem=problem, hides_later_rows=True)


def _members(tar: tarfile.TarFile, damage: list[str]) -> Iterator[tarfile.TarInfo]:
    """The regular files with a name and an ending, up to the end or to the first damage, which is noted."""
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header that it has read
            if member.isfile() and not member.issparse() and all(_split(member.name)):
                yield member
        # At a header that makes no sense, tarfile ends as if the archive did.
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
            damage.append(f"no header at byte {tar.offset:,}")
    except tarfile.TarError as error:
        if tar.offset == 0:
            raise
        damage.append(str(error))


def _split(name: str) -> tuple[str, str]:
    """The sample's name and the ending, lower case; webdataset cuts the file's name at its first dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, ending = file.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem else ("", "")


def _sample(shard: Path, tar: tarfile.TarFile, name: str, members: list[tarfile.TarInfo]) -> Sample:
    by_ending = {_split(member.name)[1]: member for member in members}
    images = [by_ending[ending] for ending in IMAGES if ending in by_ending]
    if len(images) != 1:
        return Sample(name, problem=f"it has {len(images)} pictures ({', '.join(sorted(by_ending))}) instead of one")
    columns: dict[str, Any] = {}
    try:
        if COLUMNS in by_ending:
            loaded: Any = json.loads(_text(tar, by_ending[COLUMNS]))
            if not isinstance(loaded, dict):
                return Sample(name, problem="its .json is not a JSON object")
            columns = loaded
        if CAPTION in by_ending:
            columns["text"] = _text(tar, by_ending[CAPTION])
    except UnicodeDecodeError as error:
        return Sample(name, problem=f"its text is not UTF-8 ({error})")
    except (json.JSONDecodeError, RecursionError) as error:
        return Sample(name, problem=f"its .json is not JSON ({error})")
    except DataError as error:
        return Sample(name, problem=str(error))
    if "text" not in columns and "caption" in columns:
        columns["text"] = columns.pop("caption")
    return Sample(name, Member(shard, images[0].name, images[0].offset_data, images[0].size), columns)


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > LONGEST_TEXT:
        raise DataError(f"{member.name} has {member.size:,} bytes, more than the {LONGEST_TEXT:,} of any caption")
    file = tar.extractfile(member)
    assert file is not None  # it is a regular file
    return file.read().decode("utf-8-sig")
