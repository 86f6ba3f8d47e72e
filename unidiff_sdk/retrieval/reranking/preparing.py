"""Compute the latents of a whole catalog, so that searches need not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from unidiff_sdk._internal.progress import progress_bar
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import ImageError
from unidiff_sdk.store import Record, Store

__all__ = ["prepare_all"]

BATCH_SIZE = 32  # images whose latents are computed at once


def prepare_all(store: Store, prepare: Callable[[Sequence[Record]], int], *, progress: bool) -> int:
    """Call `prepare` with all records of a store, batch by batch. Returns the sum of its results.

    An item whose image cannot be read is skipped. A warning names the first one. An item that was deleted or replaced
    in the meantime is skipped without a warning.
    """
    total, done, computed = store.count(), 0, 0
    unreadable: list[str] = []

    def prepare_each(batch: Sequence[Record]) -> int:
        count = 0
        for record in batch:
            try:
                count += prepare([record])
            except ImageError as error:
                if record in store.retrieve([record.id]):
                    unreadable.append(str(error))
        return count

    with progress_bar("Preparing", progress) as advance:
        for batch in store.scroll(BATCH_SIZE):
            try:
                computed += prepare(batch)
            except ImageError:
                computed += prepare_each(batch)
            done += len(batch)
            advance(done, total)
    if unreadable:
        warn(f"{len(unreadable)} of {total} items were skipped, because their image cannot be read: {unreadable[0]}")
    return computed
