"""The sections of full disks, and of servers that misbehave."""

from __future__ import annotations

import shutil
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from unidiff_sdk import Catalog, ServerOptions, UniDiffError
from unidiff_sdk.store.server import retries

from .corpus import COLORS, copy_sparse
from .operations import OPERATIONS, require
from .workers import ACCEPTED, FAILED, Limits, Outcome, call, run_cases

__all__ = ["can_mount", "run_full_disk", "run_server"]

ROOM = 1 << 30  # enough for every operation
SECONDS = 120.0


# ------------------------------------------------------------------------------------------------ full disks


def run_full_disk(name: str, trials: Sequence[int], seed: int, corpus: Path, work: Path) -> Iterator[Outcome]:
    """Run an operation on a file system of random size, then check it with enough room.

    It must succeed or raise a UniDiffError, and lose nothing that it acknowledged. Needs the right to mount a tmpfs.
    """
    operation = OPERATIONS[name](corpus)
    log, template, disk = work / f"disk-{name}.log", work / f"disk-{name}", work / f"disk-{name}-full"
    for place in (template, disk):
        shutil.rmtree(place, ignore_errors=True)
    log.write_bytes(b"")
    done = call(0, lambda: operation.set_up(template), SECONDS, log)
    if done.kind == FAILED:
        raise RuntimeError(f"disk-{name}: the set-up failed:\n{done.detail}")
    disk.mkdir()
    try:
        for trial in trials:
            rng = Random(f"disk:{name}:{trial}:{seed}")
            _mount(disk, ROOM)
            try:
                copy_sparse(template, disk / "trial")
                used = int(subprocess.check_output(["du", "-sk", disk / "trial"]).split()[0]) << 10
                size = used + int(rng.uniform(0, 1) ** 2 * (12 << 20)) + 4096
                _resize(disk, size)
                yield _full_disk_trial(operation, trial, size, disk, log)
            finally:
                subprocess.run(["umount", "-l", disk], check=True)
    finally:
        for place in (template, disk):
            shutil.rmtree(place, ignore_errors=True)


def _full_disk_trial(operation: Any, trial: int, size: int, disk: Path, log: Path) -> Outcome:
    acknowledged = log.with_suffix(".acknowledged")
    acknowledged.write_text("")

    def run() -> None:
        with acknowledged.open("a") as file:
            operation.run(disk / "trial", lambda part: print(part, file=file, flush=True))

    ran = call(trial, run, SECONDS, log)
    if ran.kind == FAILED:
        return Outcome(trial, FAILED, f"with {size:,} bytes\n{ran.detail}")
    _resize(disk, ROOM)
    checked = call(trial, lambda: operation.check(disk / "trial", acknowledged.read_text().split()), SECONDS, log)
    if checked.kind != ACCEPTED:
        detail = f"after {ran.detail or 'success'} with {size:,} bytes, the check failed\n{checked.detail}"
        return Outcome(trial, FAILED, detail)
    return ran


def can_mount(folder: Path) -> bool:
    """Whether this user may mount a file system of limited size."""
    place = folder / "mount"
    place.mkdir()
    try:
        _mount(place, 1 << 20)
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        subprocess.run(["umount", "-l", place], check=False, stderr=subprocess.DEVNULL)
        place.rmdir()
    return True


def _mount(place: Path, size: int) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True, stderr=subprocess.DEVNULL
    )


def _resize(place: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)


# ------------------------------------------------------------------------------------------------ servers

CALLS = 12  # calls of one trial
FAULTS: tuple[Any, ...] = (
    429,
    500,
    502,
    503,
    404,
    (429, 1),
    (503, "soon"),
    (429, 10**9),
    (429, -5),
    0.05,
    "reset",
    "reset",
    "lost",
    "lost",
    "html",
    "null",
    "not json",
    "truncated",
    "trickle",
    "endless",
)
# Changes of the result of a correct response.
CHANGES: dict[str, Any] = {
    "none": lambda result: None,
    "empty list": lambda result: [],
    "text": lambda result: "x",
    "number": lambda result: 7,
    "wait_timeout": lambda result: {"operation_id": 1, "status": "wait_timeout"},
    "acknowledged": lambda result: {"operation_id": 1, "status": "acknowledged"},
    "same page": lambda result: {**result, "next_page_offset": 1} if isinstance(result, dict) else result,
    "no payload": lambda result: _each(result, payload=None),
    "foreign payload": lambda result: _each(result, payload={"a": 1}),
    "no vector": lambda result: _each(result, vector=None),
    "short vector": lambda result: _each(result, vector=[1.0]),
    "score": lambda result: _each(result, score="high"),
    "id": lambda result: _each(result, id=17),
}
# The client gives up soon and pauses briefly, so that a trial is short.
OPTIONS = ServerOptions(timeout=1, retries=2)
PAUSE, MAX_PAUSES = 0.01, 0.5  # seconds


def _each(result: Any, **changes: Any) -> Any:
    """A response whose points have other fields."""
    if isinstance(result, dict):
        return {key: _each(value, **changes) if isinstance(value, list) else value for key, value in result.items()}
    if isinstance(result, list):
        return [{**point, **changes} if isinstance(point, dict) else _each(point, **changes) for point in result]
    return result


def run_server(trials: Sequence[int], seed: int, corpus: Path, work: Path) -> Iterator[Outcome]:
    """Use a catalog on a server that misbehaves at random, then check it when the server behaves again.

    Every call must succeed or raise a UniDiffError. What was acknowledged must be stored.
    """

    def prepare() -> Any:
        retries.INITIAL_BACKOFF, retries.MAX_WAIT = PAUSE, MAX_PAUSES
        return lambda trial: _server_trial(trial, seed, corpus, work / "server")

    limits = Limits(seconds=SECONDS, cpu_seconds=30.0)
    try:
        yield from run_cases(trials, prepare, limits, work / "server.log")
    finally:
        shutil.rmtree(work / "server", ignore_errors=True)


def _server_trial(trial: int, seed: int, corpus: Path, folder: Path) -> None:
    from support.color_bundle import color_image
    from support.misbehaving_server import MisbehavingServer

    warnings.simplefilter("ignore")
    rng = Random(f"server:{trial}:{seed}")
    shutil.rmtree(folder, ignore_errors=True)
    server = MisbehavingServer()
    stored: dict[str, str | None] = {}  # None: the call failed, so that both states are right
    try:
        with Catalog(server.url, corpus / "colors", images=folder, server=OPTIONS) as catalog:
            catalog.add([color_image(color) for color in COLORS], list(COLORS), [f"S-{k}" for k in range(4)])
            stored.update({f"S-{k}": color for k, color in enumerate(COLORS)})
            rate = rng.choice((0.1, 0.3, 0.6))
            server.choose = lambda request: _fault(rng) if rng.random() < rate else None
            for number in range(CALLS):
                _call(catalog, rng, stored, number)
            server.choose = lambda request: None
            for id, text in stored.items():
                hit = catalog.get(id)
                if text is not None:
                    require(hit is not None and hit.text == text, f"{id} was acknowledged as {text!r}, but is {hit}")
            catalog.search("red", limit=20)
            started = time.monotonic()
        require(time.monotonic() - started < 5, "closing took more than 5 s")
    finally:
        server.stop()


def _fault(rng: Random) -> Any:
    return rng.choice(FAULTS) if rng.random() < 0.6 else CHANGES[rng.choice(sorted(CHANGES))]


def _call(catalog: Catalog, rng: Random, stored: dict[str, str | None], number: int) -> None:
    from support.color_bundle import color_image

    color, id = rng.choice(COLORS), f"S-{rng.randrange(8)}"
    try:
        match rng.randrange(6):
            case 0 | 1:
                text = f"{color} {number}"
                stored[id] = None
                catalog.add(color_image(color, (30, 20 + number)), text, id)
                stored[id] = text
            case 2:
                catalog.search(color, limit=5, where=rng.choice((None, {"price": {"lt": 3}})))
            case 3:
                catalog.get(id)
            case 4:
                catalog.browse(limit=10)
            case _:
                catalog.count()
    except UniDiffError:
        return
