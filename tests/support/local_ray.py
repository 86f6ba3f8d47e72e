"""What bulk jobs use of `ray.data`, in this process: tests of records and results need no cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from unidiff_sdk.scale import generating, indexing

_running: list[Any] = []  # the stages of a job, which have a process each on a cluster


class Rows:
    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._rows = rows

    def flat_map(self, function: Callable[..., Any], *, fn_kwargs: Mapping[str, Any], **_: Any) -> Rows:
        return Rows(made for row in self._rows for made in function(dict(row), **fn_kwargs))

    def repartition(self, **_: Any) -> Rows:
        return self

    def map_batches(self, stage: Callable[..., Any], *, fn_constructor_kwargs: Mapping[str, Any], **_: Any) -> Rows:
        return Rows(self._batches(stage, fn_constructor_kwargs))

    def _batches(self, stage: Callable[..., Any], arguments: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        made = stage(**arguments)
        _running.append(made)
        for row in self._rows:
            batch = made({name: np.array([value], dtype=object) for name, value in row.items()})
            yield {name: column[0] for name, column in batch.items()}

    def iter_rows(self) -> Iterator[Mapping[str, Any]]:
        return iter(self._rows)


class Data:
    @staticmethod
    def from_items(items: Iterable[Mapping[str, Any]], **_: Any) -> Rows:
        return Rows(items)

    @staticmethod
    def ActorPoolStrategy(**_: Any) -> None:  # Ray's name
        return None


@contextmanager
def ray_data(cores: int, gpus: float) -> Iterator[type[Data]]:
    try:
        yield Data
    finally:
        while _running:
            if (catalog := vars(_running.pop()).get("_catalog")) is not None:
                catalog.close()  # as the end of its process does


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the bulk jobs of a test in this process."""
    for module in (generating, indexing):
        monkeypatch.setattr(module, "ray_data", ray_data)
    monkeypatch.setattr(indexing, "processes_per_machine", lambda workers: workers)
    monkeypatch.setattr(indexing, "require_ray", lambda: None)
