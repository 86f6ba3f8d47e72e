"""The record of a bulk job: which chunks are done, and what was wrong. A killed job is resumed from it.

    {"format": "unidiff-bulk", "job": {…}}
    {"part": 0, "chunk": 3, "added": 60, "skipped": 4, "failed": [], "last": false}

Only the process that started the job writes it, one line for each finished chunk. It holds a lock on the file.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

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
        StoreError: the file cannot be written, or a job that is running writes it.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self.done: dict[int, set[int]] = {}
        self._sizes: dict[int, int] = {}
        self._unfinished = ""
        head = {"format": FORMAT, "job": json.loads(json.dumps(job))}
        if not resume:
            self._file = self._opened()
            self._write(json.dumps(head), new=True)
            return
        if not path.is_file():
            raise DataError(f"There is no record of an earlier run at {path}. Run without --resume.")
        if self._head() != head:
            raise DataError(
                f"{path} is the record of another job, or the source, the bundle or an option has changed since. Run "
                "without --resume."
            )
        self._file = self._opened()
        for entry in self.entries():
            self._note(entry)
        self._unfinished = "\n"  # a killed process may have written half of a line

    @property
    def complete(self) -> set[int]:
        return {part for part, size in self._sizes.items() if len(self.done[part]) == size}

    def add(self, entry: Mapping[str, Any]) -> None:
        """Record a finished chunk. Raises StoreError."""
        self._write(json.dumps(entry))
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
        with suppress(OSError):  # `add` has reported what could not be written
            self._file.close()

    def _opened(self) -> TextIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StoreError(
                f"{self.path} is the record of a job that is running. Wait for it, or name another record (--record)."
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        return file

    def _write(self, line: str, *, new: bool = False) -> None:
        try:
            if new:
                self._file.truncate(0)
            self._file.write(f"{self._unfinished}{line}\n")
            self._file.flush()
            self._unfinished = ""
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StoreError:
        return StoreError(f"{self.path} cannot be written: {error.strerror or error}.")

    def _reading(self) -> TextIO:
        return self.path.open(encoding="utf-8", errors="replace")  # a power cut can leave anything at the end

    def _head(self) -> Any:
        with self._reading() as file:
            return parse_json(file.readline(), str(self.path), kind=dict)

    def _note(self, entry: Mapping[str, Any]) -> None:
        self.done.setdefault(entry["part"], set()).add(entry["chunk"])
        if entry["last"]:
            self._sizes[entry["part"]] = entry["chunk"] + 1
