"""A compact set that only grows, against Python's own."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from unidiff_sdk.datasets.compact_set import CompactSet


@given(batches=st.lists(st.lists(st.integers(0, 60), max_size=20), max_size=12))
def test_it_is_a_set(batches: list[list[int]]) -> None:
    seen, expected = CompactSet(), set[int]()
    for batch in batches:
        keys = [hashlib.sha256(bytes([n])).digest()[:15] + bytes([n % 2]) for n in batch]  # half of them end in a zero
        assert seen.has(keys) == [n in expected for n in batch]
        assert seen.add(keys) == [n in expected or n in batch[:place] for place, n in enumerate(batch)]
        expected |= set(batch)
        assert len(seen) == len(expected)
