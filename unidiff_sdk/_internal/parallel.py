"""Stages of work that overlap: while one batch is stored, the next is encoded and those after it are decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

__all__ = ["batched", "buffered_map"]

T = TypeVar("T")
R = TypeVar("R")


def buffered_map(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Generator[R, None, None]:
    """`map` over threads: results in order, at most `workers` + 1 of them under way or waiting to be taken.

    So memory is bounded whatever the number of items, and what takes the results works at the same time. An exception,
    of `work` or of `items`, comes when its turn has come; what was not begun is then dropped.
    """
    waiting: deque[Future[R]] = deque()
    source = iter(items)
    pool = ThreadPoolExecutor(workers)

    def begin() -> None:
        try:
            waiting.append(pool.submit(work, next(source)))
        except StopIteration:
            return
        except Exception as error:
            failed: Future[R] = Future()
            failed.set_exception(error)
            waiting.append(failed)

    try:
        for _ in range(workers + 1):
            begin()
        while waiting:
            result = waiting.popleft().result()
            begin()
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
