"""Read a dataset: images with captions and columns, in the layouts of Hugging Face and others.

    products/
        metadata.jsonl          or metadata.csv, or metadata.parquet
        boots.png
        shirts/0001.jpg

    {"file_name": "boots.png", "text": "red leather boots", "price": 79.0, "tags": ["new", "sale"]}
    {"file_name": "shirts/0001.jpg", "text": "a striped shirt", "id": "S-1", "price": 25}

`file_name` is the path of the image in the folder and `text` its caption. `id` is optional. Every other column becomes
payload. Files are UTF-8. Instead of `file_name`, a column `image` can hold the image itself, as bytes or as the
`{"bytes": …, "path": …}` of Hugging Face. `columns=` maps other names.

Values that are missing (null, NaN, and the words in `values.MISSING_WORDS`) are left out. `values.CellTypes` documents
the types of CSV cells.

`layouts` documents which other folders can be read. The table can also be a file of any name (`spring.csv`) with its
images in another folder.
"""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from unidiff_sdk._internal.files import read_regular_file
from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk._internal.warnings import safe_logger
from unidiff_sdk.errors import DataError, OptionError

from .layouts import Layout, find_layout, is_in_blobs_of
from .shards import MAX_TEXT_SIZE, Member, Sample, count_samples, read_shards
from .tables import TABLES, count_table_rows, read_table
from .values import checked_kinds, present_columns

__all__ = [
    "TABLES",
    "EmbeddedImage",
    "InvalidRow",
    "Names",
    "Row",
    "SpooledImage",
    "caption_of",
    "check_invalid_count",
    "count_rows",
    "describe_problems",
    "group_by_reason",
    "read_catalog",
    "spellings",
]

MAX_INVALID_ROWS = 1_000_000
"""The most invalid rows of a dataset. A table of kilobytes can claim billions of rows, and each one is reported."""

_FILE_NAME = "file_name"
# Names that other tools use, to suggest in messages. They are not used without being asked for.
_ALIASES = {
    "image": ("file_name", "image", "img", "photo", "picture", "file", "filename", "path", "image_path", "url"),
    "text": ("text", "caption", "title", "description", "prompt", "label", "name"),
}

# What differs between rows with the same problem: quoted values, numbers, and names of files and folders.
_DETAILS = re.compile(r"""'[^']*'|"[^"]*"|\S*[0-9/\\]\S*""")

_log = safe_logger(__name__)


@dataclass(frozen=True)
class EmbeddedImage:
    """An image that is stored in a table."""

    name: str
    content: bytes = field(repr=False)


@dataclass(frozen=True)
class SpooledImage:
    """An image that was stored in a table and is kept in a temporary file."""

    name: str
    file: BinaryIO = field(repr=False)
    offset: int
    size: int

    def read(self) -> bytes:
        """Read the content. Safe to use from several threads."""
        return os.pread(self.file.fileno(), self.size, self.offset)


@dataclass(frozen=True)
class Row:
    """One valid row of a dataset.

    Attributes:
        source: the image: an existing file, a member of a shard, or the content of a column, in memory or spooled.
        text: the caption; "" if the dataset has none.
        payload: the other columns.
        line: the line in the table, from 1 (the header of a csv is line 1), or the number of the sample in the shards.
            With several tables, the lines of a table follow those of the tables before it.
    """

    source: Path | Member | EmbeddedImage | SpooledImage
    text: str
    payload: dict[str, Any] = field(default_factory=dict)
    line: int = 0

    @property
    def name(self) -> str:
        """The name of the image file, for messages."""
        return self.source.name

    def image(self) -> Path | bytes:
        """The image for `load_image`: a path, or its bytes. Raises DataError if the shard cannot be read."""
        if isinstance(self.source, EmbeddedImage):
            return self.source.content
        return self.source if isinstance(self.source, Path) else self.source.read()

    @property
    def nbytes(self) -> int:
        """The size of the image file, to bound the memory of several rows."""
        match self.source:
            case EmbeddedImage():
                return len(self.source.content)
            case Path():
                return self.source.stat().st_size if self.source.is_file() else 0
        return self.source.size


@dataclass(frozen=True)
class InvalidRow:
    """A row that cannot be used.

    Attributes:
        line: as `Row.line`.
        file_name: the image, as far as it is known.
        reason: what is wrong.
        hides_later_rows: whether the rows after it could not be read either, because a shard is damaged.
    """

    line: int
    file_name: str
    reason: str
    hides_later_rows: bool = False

    def __str__(self) -> str:
        return terminal_safe(f"line {self.line}{f' ({self.file_name})' if self.file_name else ''}: {self.reason}")


def read_catalog(
    path: str | Path,
    *,
    images: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    kinds: Mapping[str, str] | None = None,
    captions: bool = True,
    strict: bool = False,
    on_error: Callable[[InvalidRow], None] | None = None,
    find: Callable[[Path, str], Path | str] | None = None,
) -> Iterator[Row]:
    """Iterate over the valid rows of a dataset, in order.

    Args:
        path: a folder in one of the layouts of `layouts`, one `.tar` shard, or a table (a `.jsonl`, `.csv` or
            `.parquet` file of any name).
        images: the folder that the paths in a table are relative to and must stay inside. Default: the folder of the
            table.
        columns: names of columns: `{"image": "photo", "text": "title", "id": "sku"}`; any other key renames a column
            of the payload. `{"text": None}` reads a table without captions.
        kinds: kinds of columns: "string", "number" or "boolean". Values are converted: 38 is the string "38", and "38"
            the number 38. A row with another value is invalid. Default: as the table has them, and in csv detected
            (`values.CellTypes`).
        captions: whether each image needs a caption. Otherwise, folders of images alone can be read, too.
        strict: raise DataError at the first invalid row instead of skipping it.
        on_error: called with each invalid row. By default, the problems are logged as warnings, each once.
        find: how the path of an image in a table is found: (folder of the images, path) -> file, or what is wrong with
            it. Default: an existing file in the folder.

    Raises:
        DataError: the folder or its table is missing or unreadable, has no column of images or captions, or in strict
            mode a row is invalid.
        OptionError: `columns` or `kinds` is invalid.
    """
    reader = _Reader(Names(columns or {}), checked_kinds(kinds), find or _file_in)
    layout = find_layout(path, images, captions=captions)
    if images is not None and not (layout.tables and Path(images).is_dir()):
        if layout.tables:
            raise DataError(f"images={str(images)!r}: there is no such folder. Give the folder with the images.")
        raise DataError(f"images= needs a table ({', '.join(TABLES)}), and {path} is not one. Omit images=.")
    where = layout.tables[0][0] if len(layout.tables) == 1 else Path(path)

    rows = reader.rows(layout)
    return _checked(where, rows, strict, on_error) if strict or on_error else _logged(where, rows)


def count_rows(path: str | Path, *, captions: bool = True) -> int:
    """Count the rows of a dataset, valid and invalid. Raises DataError as `read_catalog` does."""
    layout = find_layout(path, captions=captions)
    in_tables = sum(count_table_rows(table) for table, _ in layout.tables)
    return in_tables + count_samples(layout.shards) + len(layout.images)


def group_by_reason(rows: Iterable[InvalidRow]) -> list[tuple[InvalidRow, int]]:
    """The first row with each reason, and the number of rows with it. Reasons that differ in values are the same."""
    groups: dict[str, tuple[InvalidRow, int]] = {}
    for row in rows:
        reason = _DETAILS.sub("…", row.reason)
        first, count = groups.get(reason, (row, 0))
        groups[reason] = first, count + 1
    return list(groups.values())


def describe_problems(rows: Iterable[InvalidRow], shown: int) -> list[str]:
    """A line for each of the first `shown` reasons, with the number of its rows, and one for all other reasons."""
    groups = group_by_reason(rows)
    lines = [f"{row}{f' ({count:,} rows with this problem)' if count > 1 else ''}" for row, count in groups[:shown]]
    others = sum(count for _, count in groups[shown:])
    return lines + ([f"{others:,} more rows with {len(groups) - shown:,} other problems"] if others else [])


def check_invalid_count(where: str | Path, count: int) -> None:
    """Raise DataError if a dataset has more than `MAX_INVALID_ROWS` invalid rows."""
    if count > MAX_INVALID_ROWS:
        raise DataError(
            f"{where}: more than {MAX_INVALID_ROWS:,} rows are invalid. Correct the table and read it again."
        )


def _checked(
    where: Path, rows: Iterator[Row | InvalidRow], strict: bool, on_error: Callable[[InvalidRow], None] | None
) -> Iterator[Row]:
    invalid = 0
    for row in rows:
        if isinstance(row, Row):
            yield row
        elif strict or on_error is None:
            raise DataError(f"{where}, {row}")
        else:
            on_error(row)
            invalid += 1
            check_invalid_count(where, invalid)


def _logged(where: Path, rows: Iterator[Row | InvalidRow]) -> Iterator[Row]:
    """The valid rows. The others are logged: the first of each reason at once, and the number of others at the end."""
    counts: Counter[str] = Counter()

    def log(invalid: InvalidRow) -> None:
        reason = _DETAILS.sub("…", invalid.reason)
        if not counts[reason]:
            _log.warning("%s, %s: skipped", where, invalid)
        counts[reason] += 1

    yield from _checked(where, rows, False, log)
    for reason, count in counts.items():
        if count > 1:
            _log.warning("%s: %s more rows skipped for the same reason: %s", where, f"{count - 1:,}", reason)


# ------------------------------------------------------------------------------------------------ names of columns


class Names:
    """Which columns hold the image, the caption and the id.

    Args:
        columns: as for `read_catalog`.
    """

    def __init__(self, columns: Mapping[str, str | None]) -> None:
        for role, name in columns.items():
            if not (isinstance(name, str) and name) and not (name is None and role == "text"):
                raise OptionError(f"columns: {role!r:.60} is {name!r:.60}. Give the name of a column of the table.")
        self.image = columns.get("image")
        self.text = columns.get("text", "text")
        self.strings = {self.image or _FILE_NAME, self.text or ""}
        self._given = {role: name for role, name in columns.items() if name is not None}

    def check(self, table: Path, present: Sequence[str], declared: Iterable[str] = ()) -> None:
        """Raise DataError if a table lacks a column that is named or declared."""
        for role, name in [*self._given.items(), *(("", name) for name in declared)]:
            if name not in present:
                raise DataError(f"{table}: there is no column {name!r}. {self._suggest(role, name, present)}")
        if self.image is None and not {_FILE_NAME, "image"} & set(present):
            raise DataError(
                f"{table}: there is no column of images ({_FILE_NAME}, or image). "
                f"{self._suggest('image', _FILE_NAME, present)}"
            )
        if self.text == "text" not in present:
            raise DataError(
                f"{table}: there is no column of captions (text). {self._suggest('text', 'text', present)} Without "
                "captions: --columns text="
            )

    def missing(self, role: str, present: Sequence[str]) -> str:
        """What to add to the message about a row that lacks a column."""
        name = (self.image or _FILE_NAME) if role == "image" else str(self.text)
        without = " Without captions: --columns text=" if role == "text" else ""
        return "" if name in present else f". {self._suggest(role, name, present)}{without}"

    def split(self, columns: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """The image, the caption and the payload of a row, in which "id" is the id."""
        payload = dict(columns)
        image_column = self.image or (_FILE_NAME if payload.get(_FILE_NAME) is not None else "image")
        image = payload.pop(image_column, None)
        if self.image is None and isinstance(image, str) and image_column == "image":
            payload["image"], image = image, None  # a path under another name must be asked for
        text = None if self.text is None else payload.pop(self.text, None)
        for role, name in self._given.items():
            if role not in ("image", "text") and name in payload:
                payload[role] = payload.pop(name)
        return image, text, payload

    @staticmethod
    def _suggest(role: str, wanted: str, present: Sequence[str]) -> str:
        by_folded = {name.casefold().strip(): name for name in present}
        known = [*_ALIASES.get(role, ()), wanted.casefold()]
        nearest = next((by_folded[name] for name in known if name in by_folded), None)
        if nearest is None:
            close = difflib.get_close_matches(wanted.casefold(), by_folded, n=1)
            nearest = by_folded[close[0]] if close else None
        columns = f"Columns: {', '.join(map(repr, present[:20])) or 'none'}{', …' if len(present) > 20 else ''}."
        if nearest is None:
            return columns
        if not role:
            return f"{columns} The nearest is {nearest!r}."
        return f"{columns} The nearest is {nearest!r}: columns={{{role!r}: {nearest!r}}} (--columns {role}={nearest})."


# ------------------------------------------------------------------------------------------------ rows


class _Reader:
    def __init__(self, names: Names, kinds: Mapping[str, str], find: Callable[[Path, str], Path | str]) -> None:
        self.names, self.kinds, self.find = names, kinds, find

    def rows(self, layout: Layout) -> Iterator[Row | InvalidRow]:
        before = 0
        for table, images in layout.tables:
            last = 0
            root = images.resolve()
            several = f" ({table}, line %d)" if len(layout.tables) > 1 else ""

            def check_header(names: Sequence[str], table: Path = table) -> None:
                self.names.check(table, names, self.kinds)

            for line, columns in read_table(table, check_header, self.kinds, self.names.strings):
                last = max(last, line)
                where = several % line if several else ""
                if isinstance(columns, str):
                    yield InvalidRow(before + line, "", columns + where)
                else:
                    yield self._table_row(root, before + line, columns, where)
            before += last
        for number, sample in enumerate(read_shards(layout.shards), start=1):
            yield self._sample(number, sample)
        for number, image in enumerate(layout.images, start=1):
            yield _image_with_sidecar(layout, number, image)

    def _table_row(self, root: Path, line: int, columns: dict[str, Any], where: str) -> Row | InvalidRow:
        try:
            image, text, payload = self.names.split(present_columns(columns, self.kinds))
        except ValueError as error:
            return InvalidRow(line, "", f"{error}{where}")
        if image is None or (isinstance(image, str) and not image.strip()):
            return InvalidRow(line, "", f"file_name is missing{self.names.missing('image', list(columns))}{where}")
        source = self._image_of(root, line, image)
        name = image if isinstance(image, str) else getattr(source, "name", "")
        if isinstance(source, str):
            return InvalidRow(line, name[:80], source + where)
        if self.names.text is not None and (not isinstance(text, str) or not text.strip()):
            missing = self.names.missing("text", list(columns))
            return InvalidRow(line, name[:80], f"the caption (text) is missing{missing}{where}")
        return Row(source, text.strip() if isinstance(text, str) else "", payload, line)

    def _image_of(self, root: Path, line: int, image: Any) -> Path | EmbeddedImage | str:
        """The image of a row, or what is wrong with it."""
        match image:
            case {"bytes": bytes(content), **rest}:
                return EmbeddedImage(str(rest.get("path") or f"row {line}"), content)
            case {"path": str(name), **_rest}:
                return self.find(root, name)
            case bytes():
                return EmbeddedImage(f"row {line}", image)
            case str():
                return self.find(root, image)
        return f"the image is {type(image).__name__} {image!r:.60}. Give a path, bytes, or {{'bytes': …, 'path': …}}"

    def _sample(self, number: int, sample: Sample) -> Row | InvalidRow:
        try:
            _, text, payload = self.names.split(present_columns(sample.columns, self.kinds))
        except ValueError as error:
            return InvalidRow(number, sample.name, str(error))
        if sample.image is None:
            return InvalidRow(number, sample.name, sample.problem, sample.hides_later_rows)
        if self.names.text is not None and (not isinstance(text, str) or not text.strip()):
            return InvalidRow(number, sample.name, "the caption is missing (.txt, or text in the .json)")
        return Row(sample.image, text.strip() if isinstance(text, str) else "", payload, number)


def _file_in(root: Path, name: str) -> Path | str:
    """A file below `root`, or what is wrong. Names from Windows and in another Unicode form are found, too."""
    try:
        for spelling in spellings(name):
            path = root / spelling
            resolved = path.resolve()
            if not resolved.is_relative_to(root) and not (path.is_file() and is_in_blobs_of(root, resolved)):
                return "the path leads out of the folder of the images"
            if resolved.is_file():
                return resolved if resolved.is_relative_to(root) else path
    except (OSError, ValueError) as error:  # a name with a null byte, or one too long for the file system
        return f"file_name is not a valid path ({error})"
    return "there is no such image file"


def spellings(name: str) -> list[str]:
    """The names under which a file may be stored: as given, with the slashes of Windows, in each Unicode form."""
    return list(
        dict.fromkeys(
            unicodedata.normalize(form, spelling) if form else spelling
            for spelling in (name, name.replace("\\", "/"))
            for form in (None, "NFC", "NFD")
        )
    )


def _image_with_sidecar(layout: Layout, number: int, image: Path) -> Row | InvalidRow:
    name = image.relative_to(layout.root).as_posix()
    source = _file_in(layout.root.resolve(), name)
    if isinstance(source, str):
        return InvalidRow(number, name, source)
    if not layout.sidecars:
        return Row(source, "", {}, number)
    try:
        sidecar = layout.sidecars.get(image.with_suffix(""), image.with_suffix(".txt"))
        content = read_regular_file(sidecar, MAX_TEXT_SIZE, DataError)
    except DataError as error:
        return InvalidRow(number, name, f"the caption is missing ({error})")
    try:
        return Row(source, caption_of(content), {}, number)
    except DataError as error:
        return InvalidRow(number, name, str(error))


def caption_of(sidecar: bytes) -> str:
    """The caption in a text file. Raises DataError."""
    try:
        text = sidecar.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"the caption is not UTF-8 ({error})") from error
    if not text:
        raise DataError("the caption is missing (.txt is empty)")
    return text
