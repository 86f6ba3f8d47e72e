"""Run code that may crash, hang or exhaust memory: in forked children, with limits that are measured.

The parent imports libraries and never opens a model or a catalog, so that a fork is cheap and safe.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unidiff_sdk.errors import UniDiffError

__all__ = [
    "ACCEPTED",
    "FAILED",
    "REFUSED",
    "Limits",
    "Outcome",
    "call",
    "fork",
    "kill",
    "outcome_of",
    "run_cases",
    "wait",
]

ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"

_PER_CHILD = 1000  # cases that one child runs, so that what one leaves behind does not count for many
_PROGRESS = struct.Struct("<qd")  # number of the running case, and when it started
_PR_SET_PDEATHSIG = 1
_LAST_LINES = 12  # lines of a traceback, and of what a crashed child wrote


@dataclass(frozen=True)
class Limits:
    """The most that one case may take. Above it, the case has failed.

    Attributes:
        seconds: wall-clock time. Generous, as other processes share the cores.
        cpu_seconds: CPU time of all threads.
        memory: growth of the resident memory in bytes.
        address_space: growth of the virtual memory in bytes, enforced by the kernel.
    """

    seconds: float = 60.0
    cpu_seconds: float = 5.0
    memory: int = 1 << 30
    address_space: int = 4 << 30


@dataclass(frozen=True)
class Outcome:
    """What one case did.

    Attributes:
        case: its number.
        kind: ACCEPTED, REFUSED (a UniDiffError) or FAILED.
        detail: the class of the error, or for a failure the end of its traceback.
        cpu_seconds, memory: what it took.
    """

    case: int
    kind: str
    detail: str = ""
    cpu_seconds: float = 0.0
    memory: int = 0


def outcome_of(case: int, act: Callable[[], object]) -> Outcome:
    """Run `act` in this process. Success and a UniDiffError are right; anything else is a failure."""
    try:
        act()
        return Outcome(case, ACCEPTED)
    except UniDiffError as error:
        return Outcome(case, REFUSED, f"{type(error).__name__}: {error}"[:500])
    except BaseException:
        return Outcome(case, FAILED, _tail(traceback.format_exc()))


def run_cases(
    cases: Sequence[int], prepare: Callable[[], Callable[[int], object]], limits: Limits, log: Path
) -> Iterator[Outcome]:
    """Run cases one after the other in forked children, and yield their outcomes in order.

    Args:
        cases: numbers of cases.
        prepare: called once in each child; returns what runs a case.
        limits: for each case.
        log: a file for what the children write, such as the message of a panic.
    """
    position = 0
    with mmap.mmap(-1, _PROGRESS.size) as progress:
        while position < len(cases):
            chunk = cases[position : position + _PER_CHILD]
            progress[:] = _PROGRESS.pack(chunk[0], time.monotonic())
            reader, writer = os.pipe()
            log.write_bytes(b"")
            child = fork(lambda w=writer, c=chunk: _serve(c, prepare, limits, progress, w), log)
            os.close(writer)
            try:
                for outcome in _outcomes(child, reader, progress, limits, log):
                    position += 1
                    yield outcome
            finally:
                os.close(reader)
                kill(child)


def call(case: int, act: Callable[[], object], seconds: float, log: Path) -> Outcome:
    """Run `act` once in a forked child, and return its outcome."""
    reader, writer = os.pipe()

    def report() -> None:
        outcome = outcome_of(case, act)
        os.write(writer, json.dumps({"kind": outcome.kind, "detail": outcome.detail[:4000]}).encode())

    child = fork(report, log)
    os.close(writer)
    with open(reader, "rb") as pipe:
        ready, _, _ = select.select([pipe], [], [], seconds)
        content = pipe.read() if ready else b""
    code = wait(child, 30) if ready else None
    if code is None:
        kill(child)
        return Outcome(case, FAILED, f"still running after {seconds:.0f} s")
    if not content:
        return Outcome(case, FAILED, f"the process ended with code {code}\n{_tail(log.read_text(errors='replace'))}")
    return Outcome(case, **json.loads(content))


def fork(act: Callable[[], object], log: Path) -> int:
    """Run `act` in a forked child, in its own process group, that ends with the parent. Return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        gc.freeze()  # the objects of the parent are not the child's to collect
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: float) -> int | None:
    """Return the exit code of a child, negative for a signal, or None if it still runs after some seconds."""
    deadline = time.monotonic() + seconds
    pause = 0.0005
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 0.02)


def kill(child: int) -> None:
    """Kill a child and the processes that it started with SIGKILL, and wait for its end."""
    for target in (lambda: os.killpg(child, signal.SIGKILL), lambda: os.kill(child, signal.SIGKILL)):
        try:
            target()
        except ProcessLookupError:
            continue
    try:
        os.waitpid(child, 0)
    except ChildProcessError:
        return


# ------------------------------------------------------------------------------------------------ parent


def _outcomes(child: int, reader: int, progress: mmap.mmap, limits: Limits, log: Path) -> Iterator[Outcome]:
    """The outcomes that a child reports, and the failure that ended it early."""
    buffer = b""
    while True:
        ready, _, _ = select.select([reader], [], [], 0.5)
        if ready:
            received = os.read(reader, 1 << 16)
            if not received:
                break
            *lines, buffer = (buffer + received).split(b"\n")
            yield from (Outcome(**json.loads(line)) for line in lines)
        case, started = _PROGRESS.unpack(progress[:])
        if case >= 0 and time.monotonic() - started > limits.seconds:
            kill(child)
            yield Outcome(case, FAILED, f"still running after {limits.seconds:.0f} s", limits.seconds)
            return
    code = wait(child, 30)
    case, _ = _PROGRESS.unpack(progress[:])
    if case >= 0:
        name = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        yield Outcome(case, FAILED, f"the process ended by {name}\n{_tail(log.read_text(errors='replace'))}")


def _tail(text: str) -> str:
    return "\n".join(line[:300] for line in text.strip().splitlines()[-_LAST_LINES:])


# ------------------------------------------------------------------------------------------------ child


def _serve(
    cases: Sequence[int],
    prepare: Callable[[], Callable[[int], object]],
    limits: Limits,
    progress: mmap.mmap,
    writer: int,
) -> None:
    run = prepare()
    allowed = _status("VmSize") + limits.address_space
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    for case in cases:
        progress[:] = _PROGRESS.pack(case, time.monotonic())
        before, started = _reset_peak(), time.process_time()
        outcome = outcome_of(case, lambda c=case: run(c))
        cpu, memory = time.process_time() - started, max(0, _status("VmHWM") - before)
        os.write(writer, json.dumps(_within(outcome, cpu, memory, limits)).encode() + b"\n")
    progress[:] = _PROGRESS.pack(-1, 0.0)
    os.close(writer)


def _within(outcome: Outcome, cpu: float, memory: int, limits: Limits) -> dict[str, Any]:
    kind, detail = outcome.kind, outcome.detail
    if kind != FAILED and cpu > limits.cpu_seconds:
        kind, detail = FAILED, f"took {cpu:.1f} s of CPU time ({detail or kind})"
    if kind != FAILED and memory > limits.memory:
        kind, detail = FAILED, f"took {memory >> 20} MiB of memory ({detail or kind})"
    return {"case": outcome.case, "kind": kind, "detail": detail, "cpu_seconds": cpu, "memory": memory}


def _reset_peak() -> int:
    """Reset the peak of the resident memory, and return what is resident now in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
