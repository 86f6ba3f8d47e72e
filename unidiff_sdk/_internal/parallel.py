"""A threaded `map` with bounded memory, and batches: stages of work that run at the same time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["batched", "buffered_map"]

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


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of `size` items; the last one may be shorter. `itertools.batched` needs Python 3.12."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
