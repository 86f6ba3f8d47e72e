"""A threaded `map` with bounded memory, and batches: stages of work that run at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["BATCH_BYTES", "batched", "buffered_map"]

BATCH_BYTES = 64 << 20
"""The bytes of a batch of items with a known size. Each worker holds a batch, so that large items make it shorter."""

T = TypeVar("T")
R = TypeVar("R")


def buffered_map(function: Callable[[T], R], items: Iterable[T], *, workers: int) -> Generator[R, None, None]:
    """Apply a function to items in threads and yield the results in order.

    At most `workers` + 1 items are in progress or waiting to be consumed, so memory is bounded. The consumer runs at
    the same time as the workers. `Executor.map` reads all items at once before Python 3.14, which adds `buffersize`.

    Args:
        function: called in a worker thread.
        items: read lazily, in the consumer's thread.
        workers: the number of threads.

    Raises:
        Exception: an exception of `function` or `items` is raised in place of its result. Items that have not started
            by then are dropped.
    """
    waiting: deque[Future[R]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(workers)

    def submit_next() -> None:
        try:
            waiting.append(pool.submit(function, next(source)))
        except StopIteration:
            return
        except Exception as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            waiting.append(failed)

    try:
        for _ in range(workers + 1):
            submit_next()
        while waiting:
            result = waiting.popleft().result()
            submit_next()
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def batched(items: Iterable[T], size: int, weight: Callable[[T], int] | None = None) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last one may be shorter.

    Args:
        items: read lazily.
        size: the largest number of items of a list.
        weight: the bytes of an item. A list ends at the item with which it reaches `BATCH_BYTES`.
    """
    batch: list[T] = []
    total = 0
    for item in items:
        batch.append(item)
        total += weight(item) if weight else 0
        if len(batch) == size or total >= BATCH_BYTES:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
