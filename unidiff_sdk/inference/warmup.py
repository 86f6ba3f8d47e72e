"""The first call of each graph, before anybody waits for it: it loads, tunes and, with TensorRT, builds engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unidiff_sdk.errors import BundleError

from .sessions import cache_folder

if TYPE_CHECKING:
    from .bundle import Bundle

__all__ = ["GraphWarmup", "warm_up"]


@dataclass(frozen=True)
class GraphWarmup:
    """How one graph started.

    Attributes:
        graph: its name.
        providers: the execution providers that really loaded, the one that runs it first.
        load_seconds: reading the file and, with TensorRT, building the engine or reading it from the cache.
        first_seconds: the first call, at the usual shapes.
        next_seconds: the call after it.
        engines_built: how many TensorRT engines were not in the cache yet.
        captured: whether calls of the usual shapes are replayed from a CUDA graph.
    """

    graph: str
    providers: tuple[str, ...]
    load_seconds: float
    first_seconds: float
    next_seconds: float
    engines_built: int
    captured: bool


def warm_up(bundle: Bundle, say: Callable[[str], None]) -> list[GraphWarmup]:
    """Load every graph of `bundle` and call it twice on zeros; `say` is told in one line what each step may cost."""
    report = []
    for graph, described in bundle.manifest.graphs.items():
        profile = bundle.profile(graph)
        if profile is None:
            raise BundleError(f"{bundle.path}: the manifest does not say the shapes of {graph}; export it again")
        inputs = {name: np.zeros(bounds["opt"], described.inputs[name].dtype) for name, bounds in profile.items()}
        cost = "building or reading its TensorRT engine: minutes the first time" if bundle.device == "tensorrt" else ""
        say(f"loading {graph} {cost}".strip())
        before = _engines()
        started = time.perf_counter()
        session = bundle.session(graph)
        loaded = time.perf_counter()
        session.run(None, inputs)
        first = time.perf_counter()
        session.run(None, inputs)
        second = time.perf_counter()
        report.append(
            GraphWarmup(
                graph=graph,
                providers=tuple(session.get_providers()),
                load_seconds=loaded - started,
                first_seconds=first - loaded,
                next_seconds=second - first,
                engines_built=len(_engines() - before),
                captured=getattr(session, "captured", False),
            )
        )
    return report


def _engines() -> set[Path]:
    return set(cache_folder().rglob("*.engine"))
