"""Progress on stderr: a bar on a terminal, otherwise a line every 30 seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Self

from .text import terminal_safe

__all__ = ["LINE_INTERVAL", "ProgressLines", "count_line", "progress_bar"]

LINE_INTERVAL = 30.0
"""Seconds between two lines of progress where there is no terminal: enough to see in a log that a job is alive."""


class ProgressLines:
    """Prints the latest state of a job as one line, every `interval` seconds, while the block runs.

    Args:
        text: the state before the first update.
        interval: in seconds.
    """

    def __init__(self, text: str = "", interval: float | None = None) -> None:
        self._text = text
        self._interval = LINE_INTERVAL if interval is None else interval
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._print, name="unidiff-progress", daemon=True)

    def update(self, text: str) -> None:
        """Set the state."""
        self._text = text

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def _print(self) -> None:
        while not self._ended.wait(self._interval):
            if self._text:
                print(terminal_safe(self._text), file=sys.stderr, flush=True)


def count_line(label: str, done: int, total: int, seconds: float) -> str:
    """The state of a job as text: "Indexing: 1,200 of 5,000 in 0:00:30, 40/s, 0:01:35 left"."""
    text = f"{label}: {done:,} of {total:,} in {timedelta(seconds=round(seconds))}"
    if not done or not seconds:
        return text
    left = timedelta(seconds=round(seconds / done * (total - done)))
    return f"{text}, {_rate(done / seconds)}, {left} left"


def _rate(speed: float) -> str:
    return f"{speed:,.{1 if speed < 10 else 0}f}/s"


@contextmanager
def progress_bar(label: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a function (done, total) that updates the progress, or that does nothing if `shown` is false.

    The bar appears with the first update, so that an error before it prints one line only.
    """
    if not shown:
        yield lambda done, total: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        started = time.monotonic()
        with ProgressLines() as lines:
            yield lambda done, total: lines.update(count_line(label, done, total, time.monotonic() - started))
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class RateColumn(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else _rate(speed), style="progress.data.speed")

    columns = (TextColumn(label, markup=False), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task("")

    def advance(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if bar.live.is_started:  # otherwise `stop` prints an empty line
            bar.stop()
