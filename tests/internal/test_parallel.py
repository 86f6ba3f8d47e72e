"""`buffered_map`: order, bounded memory, parallelism and errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from unidiff_sdk._internal.parallel import batched, buffered_map


def test_results_are_in_order_and_memory_is_bounded() -> None:
    taken: list[int] = []
    ahead: list[int] = []

    def source() -> Iterator[int]:
        for n in range(40):
            ahead.append(n - len(taken))
            yield n

    def work(n: int) -> int:
        time.sleep(0.002 * (n % 3))
        return n * n

    for result in buffered_map(work, source(), workers=3):
        taken.append(result)
    assert taken == [n * n for n in range(40)]
    assert max(ahead) <= 4


def test_calls_run_at_the_same_time() -> None:
    """Three calls that wait for one another finish only if they run at the same time."""
    barrier = threading.Barrier(3, timeout=5)
    assert len(list(buffered_map(lambda _: barrier.wait(), range(3), workers=3))) == 3


def test_error_is_raised_in_order_and_stops_the_rest() -> None:
    started: list[int] = []

    def work(n: int) -> int:
        started.append(n)
        if n == 2:
            raise ValueError("two")
        return n

    results = buffered_map(work, range(1000), workers=2)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
    assert len(started) < 8


def test_error_of_the_source_is_raised_after_the_results_before_it() -> None:
    def source() -> Iterator[int]:
        yield from range(2)
        raise ValueError("dry")

    taken = []
    with pytest.raises(ValueError, match="dry"):
        for result in buffered_map(lambda n: n, source(), workers=1):
            taken.append(result)
    assert taken == [0, 1]


def test_batched_yields_lists() -> None:
    assert list(batched(range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_batched_ends_a_batch_at_its_limit_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unidiff_sdk._internal.parallel.BATCH_BYTES", 10)
    sizes = [4, 4, 4, 30, 1, 1, 1, 1]
    assert list(batched(sizes, 3, lambda size: size)) == [[4, 4, 4], [30], [1, 1, 1], [1]]
    assert list(batched(sizes, 5, lambda size: size)) == [[4, 4, 4], [30], [1, 1, 1, 1]]
