"""Files of published datasets: text, tables, and the images that they name."""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import is_plain_path, open_regular_file, read_regular_file
from unidiff_sdk._internal.json_values import MAX_DOCUMENT
from unidiff_sdk.datasets.tables import MAX_LINE
from unidiff_sdk.errors import DataError

__all__ = ["IMAGE_SUFFIXES", "find_folder", "image_in", "lines_of", "text_of", "words"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def text_of(file: Path) -> str:
    """The content of a UTF-8 file. Raises DataError if it is too large or is not text."""
    try:
        return read_regular_file(file, MAX_DOCUMENT, DataError).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from None


def lines_of(file: Path) -> Iterator[str]:
    """Iterate over the lines of a UTF-8 file of any size, also of a `.gz`. Raises DataError."""
    stream = open_regular_file(file, DataError)
    content: Any = gzip.GzipFile(fileobj=stream) if file.suffix == ".gz" else stream
    try:
        with stream, io.TextIOWrapper(content, encoding="utf-8-sig") as text:
            while line := text.readline(MAX_LINE):
                if len(line) == MAX_LINE:
                    raise DataError(f"{file}: a line has more than {MAX_LINE:,} characters")
                yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}). Save it as UTF-8.") from None
    except (OSError, EOFError) as error:  # gzip raises both for a damaged file
        raise DataError(f"{file}: cannot be read ({error}). Download it again.") from error


def find_folder(source: Path, names: tuple[str, ...], content: str) -> Path:
    """The first of several folders that exists in `source`. Raises DataError if none does."""
    for name in names:
        if (source / name).is_dir():
            return source / name
    raise DataError(f"{source / names[0]}: there is no such folder. It holds {content}.")


def image_in(folder: Path, name: str) -> Path | None:
    """The image of a name that a dataset states; None if there is none, or if the name leads out of the folder."""
    if not is_plain_path(name) or Path(name).suffix.lower() not in IMAGE_SUFFIXES:
        return None
    file = folder / name
    return file if file.is_file() else None


def words(value: Any) -> str:
    """A text value without surrounding and repeated white space; "" for any other value."""
    return " ".join(value.split()) if isinstance(value, str) else ""
