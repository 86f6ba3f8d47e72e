"""The sections of kills: an operation is killed with SIGKILL at a random time, then everything is checked."""

from __future__ import annotations

import os
import select
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from .corpus import copy_sparse
from .operations import OPERATIONS, Operation
from .workers import FAILED, Outcome, call, fork, kill, wait

__all__ = ["run_kills"]

MEASURED = 2  # uninterrupted runs whose longest duration bounds the time of a kill
SECONDS = 300.0  # the longest that an operation or a check may take


def run_kills(name: str, trials: Sequence[int], seed: int, corpus: Path, work: Path) -> Iterator[Outcome]:
    """Run trials of one operation: set it up, kill it once or twice at random times, check it, and yield the outcome.

    The check runs in a process of its own, too, as a user would open the catalog after a crash.
    """
    operation = OPERATIONS[name](corpus)
    operation.warm_up()
    log, template, folder = work / f"kill-{name}.log", work / f"kill-{name}", work / f"kill-{name}-trial"
    log.write_bytes(b"")
    try:
        for place in (template, folder):
            shutil.rmtree(place, ignore_errors=True)
        done = call(0, lambda: operation.set_up(template), SECONDS, log)
        if done.kind == FAILED:
            raise RuntimeError(f"kill-{name}: the set-up failed:\n{done.detail}")
        duration = max(_run(operation, template, folder, log, None)[1] for _ in range(MEASURED))
        for trial in trials:
            rng = Random(f"kill:{name}:{trial}:{seed}")
            yield _trial(operation, trial, rng, duration, template, folder, log)
    finally:
        for place in (template, folder):
            shutil.rmtree(place, ignore_errors=True)


def _trial(
    operation: Operation, trial: int, rng: Random, duration: float, template: Path, folder: Path, log: Path
) -> Outcome:
    acknowledged: list[str] = []
    delays = [rng.uniform(0, duration) for _ in range(rng.choice((1, 1, 2)))]
    for number, delay in enumerate(delays):
        some, _ = _run(operation, None if number else template, folder, log, delay)
        acknowledged = some or acknowledged  # a second run starts from what the first one left
    checked = call(trial, lambda: operation.check(folder, acknowledged), SECONDS, log)
    detail = f"killed after {', '.join(f'{delay:.3f}' for delay in delays)} of {duration:.3f} s\n{checked.detail}"
    kind = checked.kind if checked.kind == "accepted" else FAILED  # an error of the SDK is no right outcome here
    return Outcome(trial, kind, detail if kind == FAILED else "", checked.cpu_seconds, checked.memory)


def _run(
    operation: Operation, template: Path | None, folder: Path, log: Path, delay: float | None
) -> tuple[list[str], float]:
    """Run an operation in a forked child, and kill it after a delay.

    Args:
        template: what `set_up` wrote; copied first. None: continue with what is in `folder`.
        delay: seconds after its start. None: let it end.

    Returns:
        What it acknowledged, and the seconds that it ran.
    """
    if template is not None:
        shutil.rmtree(folder, ignore_errors=True)
        copy_sparse(template, folder)
    reader, writer = os.pipe()

    def act() -> None:
        os.write(writer, b"start\n")
        operation.run(folder, lambda part: os.write(writer, f"{part}\n".encode()) and None)

    child = fork(act, log)
    os.close(writer)
    with open(reader, "rb", buffering=0) as acknowledgments:
        if not select.select([acknowledgments], [], [], SECONDS)[0]:
            kill(child)
            raise RuntimeError(f"{operation.name} did not start")
        started = time.monotonic()
        code = wait(child, SECONDS if delay is None else delay)
        elapsed = time.monotonic() - started
        if code is None:
            kill(child)
        if delay is None and code != 0:
            raise RuntimeError(f"{operation.name} failed without a kill ({code}):\n{log.read_text()[-3000:]}")
        lines = b"".join(iter(lambda: acknowledgments.read(1 << 16), b"")).decode().split()
    return [line for line in lines if line != "start"], elapsed
