"""Payload indexes: created once, also if several threads need one."""

from __future__ import annotations

import threading
import time

from unidiff_sdk.store.indexes import PayloadIndexes


class RecordingStore:
    """Records what is created and dropped. Creating takes a while."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ...]] = []

    def create_index(self, column: str, kind: str) -> None:
        self.calls.append(("create", column, kind))
        time.sleep(0.05)

    def drop_index(self, column: str) -> None:
        self.calls.append(("drop", column))


def test_index_needed_by_four_threads_is_created_once() -> None:
    indexes, store = PayloadIndexes({}), RecordingStore()
    threads = [threading.Thread(target=indexes.ensure, args=("brand", "keyword", store)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.calls == [("create", "brand", "keyword")]


def test_filter_uses_an_existing_index_of_another_kind() -> None:
    indexes, store = PayloadIndexes({"brand": "text"}), RecordingStore()
    indexes.ensure_for_filter({"brand": "keyword", "price": "float"}, store)
    assert store.calls == [("create", "price", "float")]


def test_index_of_numbers_is_dropped_for_a_range_of_dates_and_not_created_again() -> None:
    indexes, store = PayloadIndexes({"added": "float"}), RecordingStore()
    for kind in ("datetime", "float", "datetime"):
        indexes.ensure_for_filter({"added": kind}, store)
    assert store.calls == [("drop", "added")]
