"""A set of 16-byte keys that takes 16 bytes a key: 16 MB for a million, where a Python set takes several times that."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["CompactSet"]


class CompactSet:
    """A set of byte strings of length 16, such as UUIDs or truncated hashes. Keys can be added but not removed."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.bytes_]] = []  # each sorted, and less than half as long as the one before

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def has(self, keys: Iterable[bytes]) -> list[bool]:
        """Return for each key whether it is in the set."""
        wanted = np.array(list(keys), "S16")
        known = np.zeros(len(wanted), bool)
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, wanted), len(run) - 1)
            known |= run[places] == wanted
        return known.tolist()

    def add(self, keys: Iterable[bytes]) -> list[bool]:
        """Add keys. Returns for each whether it was in the set already, or occurs earlier among `keys`."""
        keys = list(keys)
        known = self.has(keys)
        fresh: set[bytes] = set()
        for place, key in enumerate(keys):
            known[place] |= key in fresh
            if not known[place]:
                fresh.add(key)
        if fresh:
            run = np.sort(np.array(list(fresh), "S16"))
            while self._runs and len(self._runs[-1]) < 2 * len(run):
                run = np.sort(np.concatenate([self._runs.pop(), run]))
            self._runs.append(run)
        return known
