"""The record of a bulk job: which chunks are done, and what was wrong. A killed job is resumed from it.

    {"format": "unidiff-bulk", "job": {…}}
    {"part": 0, "chunk": 3, "added": 60, "skipped": 4, "failed": [], "last": false}

Only the process that started the job writes it, one line for each finished chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from unidiff_sdk._internal.files import write_atomically
from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.errors import DataError, StoreError

__all__ = ["RunFile"]

FORMAT = "unidiff-bulk"


class RunFile:
    """The record of one job.

    Args:
        path: the file.
        job: what the job does, as JSON. A record of another job is not continued.
        resume: continue the record, instead of starting a new one.

    Attributes:
        done: the numbers of the finished chunks by part, a few bytes for each chunk.
        complete: the parts whose chunks are all finished.

    Raises:
        DataError: with `resume`, there is no record, it is damaged, or that of another job.
        StoreError: the file cannot be written.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.done: dict[int, set[int]] = {}
        self._sizes: dict[int, int] = {}
        self._file: TextIO | None = None
        head = {"format": FORMAT, "job": json.loads(json.dumps(job))}
        if not resume:
            write_atomically(path, (json.dumps(head) + "\n").encode())
            return
        if not path.is_file():
            raise DataError(f"There is no record of an earlier run at {path}. Run without --resume.")
        if self._head() != head:
            raise DataError(
                f"{path} is the record of another job, or the source, the bundle or an option has changed since. Run "
                "without --resume."
            )
        for entry in self.entries():
            self._note(entry)

    @property
    def complete(self) -> set[int]:
        return {part for part, size in self._sizes.items() if len(self.done[part]) == size}

    def add(self, entry: Mapping[str, Any]) -> None:
        """Record a finished chunk. Raises StoreError."""
        try:
            if self._file is None:
                self._file = self.path.open("a", encoding="utf-8")
                self._file.write("\n")  # a killed process may have written half of a line
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError as error:
            raise StoreError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        self._note(entry)

    def entries(self) -> Iterator[dict[str, Any]]:
        """The recorded chunks, each once."""
        seen: set[tuple[int, int]] = set()
        with self._reading() as file:
            next(file, None)
            for line in file:
                try:
                    entry = parse_json(line, str(self.path), kind=dict)
                    place = (int(entry["part"]), int(entry["chunk"]))
                except (DataError, KeyError, TypeError, ValueError):
                    continue  # half of a line: its chunk is done again
                if place not in seen:
                    seen.add(place)
                    yield entry

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with suppress(OSError):  # `add` has reported what could not be written
                self._file.close()

    def _reading(self) -> TextIO:
        return self.path.open(encoding="utf-8", errors="replace")  # a power cut can leave anything at the end

    def _head(self) -> Any:
        with self._reading() as file:
            return parse_json(file.readline(), str(self.path), kind=dict)

    def _note(self, entry: Mapping[str, Any]) -> None:
        self.done.setdefault(entry["part"], set()).add(entry["chunk"])
        if entry["last"]:
            self._sizes[entry["part"]] = entry["chunk"] + 1
