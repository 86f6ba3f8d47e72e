"""A server in a process of its own, and the memory that it takes."""

from __future__ import annotations

import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Server", "peer_command", "started", "unidiff_command"]

START_SECONDS, END_SECONDS = 180.0, 60.0
_ADDRESS = re.compile(rb"http://127\.0\.0\.1:(\d+)")


@dataclass(frozen=True)
class Server:
    """A server that listens at 127.0.0.1."""

    process: subprocess.Popen[bytes]
    port: int

    def memory(self) -> int:
        """The private memory in bytes. Files that are mapped do not count: the system may drop them at any time."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Private_"))

    def peak_memory(self) -> int:
        """The largest resident memory since the start or the last `reset_peak`, in bytes."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM"))

    def reset_peak(self) -> None:
        """Let `peak_memory` start anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")

    def kill(self) -> None:
        """End the process as a power failure would."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_SECONDS)


def unidiff_command(catalog: Path, *options: str) -> list[str]:
    """The command that serves a catalog."""
    return [sys.executable, "-m", "unidiff_sdk", "serve", str(catalog), "--port", "0", *options]


def peer_command(products: Path) -> list[str]:
    """The command of the server written by hand."""
    return [sys.executable, str(Path(__file__).with_name("peer.py")), str(products)]


@contextmanager
def started(command: Sequence[str], log: Path) -> Iterator[Server]:
    """Start a server, wait until it prints its address, and end it after the block. Raises RuntimeError."""
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process:
        try:
            yield Server(process, _port_of(process, log))
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()


def _port_of(process: subprocess.Popen[bytes], log: Path) -> int:
    assert process.stdout is not None
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1.0)[0]:
            line = process.stdout.readline()
            if match := _ADDRESS.search(line):
                return int(match[1])
            if not line:
                break
    raise RuntimeError(f"{process.args!r} did not start: {log.read_text(errors='replace')[-2000:]}")
