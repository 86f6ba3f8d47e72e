"""The sections of the soak test: how many trials each has, and how a process runs one."""

from __future__ import annotations

import fcntl
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .workers import FAILED, REFUSED, Outcome, call

__all__ = ["MIXED_SECONDS", "SECTIONS", "Record", "Section", "Tally", "run_section"]

KILLS, SHORT_KILLS = 100, 1
SHORT_EXPORTS = 0  # tracing the graphs takes longer than all other sections together
INPUTS, SHORT_INPUTS = 10_000, 20
DISKS, SHORT_DISKS = 30, 1
SERVERS, SHORT_SERVERS = 100, 1
MIXED_SECONDS, SHORT_MIXED_SECONDS = 600, 4

FORMATS = (
    *("png", "jpeg", "webp", "gif", "tiff", "bmp", "ppm", "avif"),
    *("jsonl", "csv", "parquet", "tar", "where", "filter", "cursor"),
    *("manifest", "config", "onnx", "catalog", "archive", "checkpoint"),
)
KILLED = ("training", "index", "delete", "prune", "reindex", "optimize", "export", "restore")
FULL_DISKS = ("index", "delete", "prune", "reindex", "optimize", "export", "restore")
WITH_TORCH = ("mutate-checkpoint", "kill-training", "kill-unidiff-export")

_RECORD_SECONDS = 2.0  # how often a section writes what it has done
_KEPT_FAILURES = 200  # details of a section that are kept; all are counted


@dataclass(frozen=True)
class Section:
    """One section.

    Attributes:
        name: for `--only`.
        title: what it does.
        trials: of the whole run; for `mixed`, seconds.
        short: the same with `--short`.
    """

    name: str
    title: str
    trials: int
    short: int

    @property
    def needs_torch(self) -> bool:
        """Whether it trains or exports."""
        return self.name in WITH_TORCH


SECTIONS = {
    section.name: section
    for section in (
        Section("mixed", "16 threads and an event loop on one catalog", MIXED_SECONDS, SHORT_MIXED_SECONDS),
        Section("kill-unidiff-export", "unidiff-export, killed with SIGKILL", KILLS, SHORT_EXPORTS),
        *(Section(f"kill-{name}", f"{name}, killed with SIGKILL", KILLS, SHORT_KILLS) for name in KILLED),
        *(Section(f"disk-{name}", f"{name} on a full disk", DISKS, SHORT_DISKS) for name in FULL_DISKS),
        Section("server", "A server that misbehaves", SERVERS, SHORT_SERVERS),
        *(Section(f"mutate-{name}", f"Mutated inputs: {name}", INPUTS, SHORT_INPUTS) for name in FORMATS),
    )
}


@dataclass
class Tally:
    """What some trials did.

    Attributes:
        done: the number of trials.
        accepted: those that succeeded.
        refused: those that raised a UniDiffError, by class.
        failed: the number of all others.
        failures: their case numbers and details.
        seconds: wall-clock time.
        cpu_seconds, memory: the largest of one trial.
        result: the figures of `mixed`.
    """

    done: int = 0
    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory: int = 0
    result: dict[str, Any] | None = None

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self.done += 1
        self.cpu_seconds = max(self.cpu_seconds, outcome.cpu_seconds)
        self.memory = max(self.memory, outcome.memory)
        if outcome.kind == FAILED:
            self.failed += 1
            if len(self.failures) < _KEPT_FAILURES:
                self.failures.append({"case": outcome.case, "detail": outcome.detail})
        elif outcome.kind == REFUSED:
            self.refused[outcome.detail.partition(":")[0]] += 1
        else:
            self.accepted += 1

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another tally wrote with `asdict`."""
        self.done += other["done"]
        self.accepted += other["accepted"]
        self.refused.update(other["refused"])
        self.failed += other["failed"]
        self.failures += other["failures"][: _KEPT_FAILURES - len(self.failures)]
        self.seconds += other["seconds"]
        self.cpu_seconds = max(self.cpu_seconds, other["cpu_seconds"])
        self.memory = max(self.memory, other["memory"])
        self.result = other["result"] or self.result


class Record:
    """The file of a section: a line for each group of trials that were done."""

    def __init__(self, state: Path, name: str) -> None:
        self.file = state / f"{name}.jsonl"

    def read(self) -> Tally:
        """What was done so far. A last line that a kill cut off is ignored."""
        total = Tally()
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    total.merge(json.loads(line))
                except ValueError:
                    continue
        return total

    def append(self, tally: Tally) -> None:
        """Add what some trials did."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(tally)) + "\n")


def run_section(name: str, trials: int, seed: int, state: Path, work: Path) -> None:
    """Run the trials of a section that were not done yet, in this process and its children."""
    _import_libraries(SECTIONS[name].needs_torch)
    corpus = _corpus(work, SECTIONS[name].needs_torch)
    record = Record(state, name)
    done = record.read().done
    if done >= trials:
        return
    if name == "mixed":
        record.append(_mixed(trials, seed, corpus, work))
        return
    tally, started = Tally(), time.monotonic()
    for outcome in _outcomes(name, range(done, trials), seed, corpus, work):
        tally.add(outcome)
        if time.monotonic() - started > _RECORD_SECONDS:
            tally.seconds = time.monotonic() - started
            record.append(tally)
            tally, started = Tally(), time.monotonic()
    tally.seconds = time.monotonic() - started
    record.append(tally)


def _outcomes(name: str, cases: Sequence[int], seed: int, corpus: Path, work: Path) -> Iterator[Outcome]:
    from .faults import run_full_disk, run_server
    from .kills import run_kills
    from .mutations import run_mutations

    kind, _, what = name.partition("-")
    runs: dict[str, Callable[[], Iterator[Outcome]]] = {
        "kill": partial(run_kills, what, cases, seed, corpus, work),
        "disk": partial(run_full_disk, what, cases, seed, corpus, work),
        "mutate": partial(run_mutations, what, cases, seed, corpus, work),
        "server": partial(run_server, cases, seed, corpus, work),
    }
    return runs[kind]()


def _mixed(seconds: int, seed: int, corpus: Path, work: Path) -> Tally:
    """The section `mixed`: one trial, which counts as its seconds."""
    from .mixed import run_mixed

    folder = work / "mixed"
    result: dict[str, Any] = {}
    file = work / "mixed.json"

    def run() -> None:
        warnings.simplefilter("ignore")
        file.write_text(json.dumps(run_mixed(seconds, seed, corpus, folder)))

    outcome = call(0, run, seconds + 300, work / "mixed.log")
    if outcome.kind != FAILED:
        result = json.loads(file.read_text())
    problems = [*result.get("errors", ()), *([outcome.detail] if outcome.kind == FAILED else ())]
    memory = result.get("memory", {})
    if seconds >= MIXED_SECONDS and memory.get("growth_per_call", 0) > memory.get("limit_per_call", 0):
        problems.append(f"the memory grows by {memory['growth_per_call']:,} bytes a call")
    failures = [{"case": 0, "detail": problem} for problem in problems]
    return Tally(seconds, seconds, Counter(), len(problems), failures, result.get("seconds", 0.0), result=result)


def _import_libraries(torch: bool) -> None:
    """Import what forked children need, so that they do not import it again. Nothing is opened."""
    import onnx
    import onnxruntime
    import pyarrow.parquet
    import tokenizers
    from PIL import Image

    import unidiff_sdk.catalog.archive
    import unidiff_sdk.catalog.reindexing
    import unidiff_sdk.catalog.writer

    Image.init()
    imported = [onnx, onnxruntime, pyarrow.parquet, tokenizers, unidiff_sdk.catalog.archive]
    if torch:
        import torch as pytorch

        import unidiff_export.exporter
        import unidiff_sdk.training.loop.trainer

        pytorch.set_num_threads(1)
        imported += [unidiff_export.exporter, unidiff_sdk.training.loop.trainer]
    assert all(module.__name__ in sys.modules for module in imported)


def _corpus(work: Path, torch: bool) -> Path:
    """The valid files, written once by the first process that needs them."""
    from .corpus import write_checkpoint, write_corpus
    from .operations import Training

    corpus = work / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)

    def train() -> None:
        write_checkpoint(corpus)
        operation = Training(corpus)
        operation.set_up(corpus / "trained")
        operation.run(corpus / "trained", lambda step: None)

    parts: dict[str, Callable[[], None]] = {
        "files": lambda: write_corpus(corpus),
        **({"torch": train} if torch else {}),
    }
    with (work / "corpus.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, write in parts.items():
            if not (work / f"corpus.{name}").exists():
                written = call(0, write, 600, work / "corpus.log")
                if written.kind == FAILED:
                    raise RuntimeError(f"the corpus cannot be written:\n{written.detail}")
                (work / f"corpus.{name}").touch()
    return corpus
