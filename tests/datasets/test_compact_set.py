"""`CompactSet`, compared with a Python set."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from unidiff_sdk.datasets.compact_set import CompactSet


@given(batches=st.lists(st.lists(st.integers(0, 60), max_size=20), max_size=12))
def test_compact_set_equals_a_set(batches: list[list[int]]) -> None:
    compact, expected = CompactSet(), set[int]()
    for batch in batches:
        keys = [
            hashlib.sha256(bytes([n])).digest()[:15] + bytes([n % 2]) for n in batch
        ]  # half of the keys end in a zero byte
        assert compact.has(keys) == [n in expected for n in batch]
        assert compact.add(keys) == [n in expected or n in batch[:place] for place, n in enumerate(batch)]
        expected |= set(batch)
        assert len(compact) == len(expected)
