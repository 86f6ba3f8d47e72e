"""Upper bounds of the bytes by which the files of a shard grow (`_internal.memory` explains why they are needed)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "ESSENTIAL",
    "PLENTY",
    "UNFLUSHED",
    "apparent",
    "growth_of",
    "index_growth",
    "opening_growth",
    "optimizing_growth",
    "unallocated",
]

ESSENTIAL = 4 << 20
"""Bytes that opening, closing and deleting need, which may use the reserve. Measured: less than 1 MiB."""

PLENTY = 1 << 30
"""With this many free bytes, writes are not estimated and wait in memory. Below, each one is flushed at once."""

UNFLUSHED = 100_000
"""Ids that are written before a flush, so that what waits in memory fits into `PLENTY`: up to 5 KB for each."""

# 256 records of 128 numbers and 60 bytes of payload take 340 KB: vector and payload in the log and in the segment.
_COPIES, _RECORD = 4, 1024
_INDEX = 8 << 20  # a payload index takes 3 to 8 MiB before it has entries
_ENTRY = 64  # bytes of an entry besides the value

_BLOCK = 512  # bytes of a unit of `st_blocks`


def growth_of(payloads: Iterable[Mapping[str, Any]], dim: int) -> int:
    """An upper bound of the bytes by which records of these payloads make a shard grow."""
    return sum(_COPIES * (4 * dim + len(json.dumps(payload))) + _RECORD for payload in payloads)


def index_growth(payloads: Sequence[Mapping[str, Any]], count: int) -> int:
    """An upper bound of the bytes of a new payload index over `count` records, estimated from some of them."""
    sizes = [2 * len(json.dumps(payload)) + _ENTRY for payload in payloads]
    return _INDEX + count * sum(sizes) // max(1, len(sizes))


def opening_growth(shard: Path) -> int:
    """An upper bound of the bytes by which a shard grows when it is opened: the holes of its payload indexes."""
    return sum(map(unallocated, shard.glob("segments/*/payload_index")))


def optimizing_growth(shard: Path, payloads: Sequence[Mapping[str, Any]], count: int, dim: int) -> int:
    """An upper bound of the bytes of a copy of a shard, in which holes are filled, and of its new segments.

    Args:
        shard: the shard.
        payloads: of some of its records.
        count: the number of its records.
        dim: the length of its vectors.
    """
    return apparent(shard) + count * growth_of(payloads, dim) // max(1, len(payloads))


def apparent(folder: Path) -> int:
    """The sum of the sizes of the files below a folder."""
    return sum(status.st_size for status in _files(folder))


def unallocated(folder: Path) -> int:
    """The bytes by which the files below a folder can grow without a change of their sizes."""
    return sum(max(0, status.st_size - status.st_blocks * _BLOCK) for status in _files(folder))


def _files(folder: Path) -> Iterable[os.stat_result]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.stat(os.path.join(parent, name))
            except FileNotFoundError:  # the engine renames and deletes files
                continue
