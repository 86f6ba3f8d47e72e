"""Pages in a total order, from an engine that orders equal items at random."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff_sdk.store.ordering import Ranked, Window, read_page


@settings(max_examples=200, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 3), max_size=200),
    offset=st.integers(0, 210),
    limit=st.integers(1, 210),
    seed=st.randoms(use_true_random=False),
)
def test_read_page_is_a_slice_of_the_total_order(
    ranks: list[int], offset: int, limit: int, seed: random.Random
) -> None:
    items = [Ranked(float(rank), f"{n:03}") for n, rank in enumerate(ranks)]
    seed.shuffle(items)

    def fetch(window: Window) -> list[Ranked]:
        shuffled = sorted(items, key=lambda item: (item.rank, seed.random()))
        return shuffled[window.start : window.start + window.size]

    assert read_page(fetch, offset, limit) == sorted(items)[offset : offset + limit]


def test_read_page_reads_one_window_without_equal_items() -> None:
    windows = []

    def fetch(window: Window) -> list[Ranked]:
        windows.append(window)
        return [Ranked(float(n), str(n)) for n in range(window.start, window.start + window.size)]

    assert [item.rank for item in read_page(fetch, 50, 10)] == [*range(50, 60)]
    assert windows == [Window(49, 12)]
