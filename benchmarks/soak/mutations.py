"""The section of mutated inputs."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from .bundle_formats import ALL_FORMATS
from .formats import Format
from .workers import Limits, Outcome, run_cases

__all__ = ["input_of", "replay", "run_mutations"]

# Formats whose libraries take longer than the others to read one input.
LIMITS = {"checkpoint": Limits(cpu_seconds=20.0)}


def run_mutations(name: str, cases: Sequence[int], seed: int, corpus: Path, work: Path) -> Iterator[Outcome]:
    """Run the mutated inputs of one format, in order."""
    folder = work / f"mutate-{name}"

    def prepare() -> Callable[[int], None]:
        warnings.simplefilter("ignore")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        kind = ALL_FORMATS[name](corpus, folder)
        return lambda case: kind.use(input_of(kind, case, seed))

    try:
        yield from run_cases(cases, prepare, LIMITS.get(name, Limits()), work / f"mutate-{name}.log")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def input_of(kind: Format, case: int, seed: int) -> Any:
    """The input with a number. It depends on nothing else but the seed and the corpus."""
    return kind.make(Random(f"{kind.name}:{case}:{seed}"))


def replay(name: str, case: int, seed: int, corpus: Path, folder: Path, save: Path | None = None) -> float:
    """Run one input in this process, and let its error through. Returns the seconds that it took.

    Args:
        save: where to write the input first.
    """
    kind = ALL_FORMATS[name](corpus, folder)
    content = input_of(kind, case, seed)
    if save is not None:
        save.write_bytes(kind.save(content))
    started = time.perf_counter()
    kind.use(content)
    return time.perf_counter() - started
