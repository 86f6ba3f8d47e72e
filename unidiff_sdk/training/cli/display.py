"""Terminal output of the commands: progress, losses, skipped rows and tables of figures."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unidiff_sdk._internal.progress import ProgressLines, count_line
from unidiff_sdk.cli.console import echo
from unidiff_sdk.cli.output.terminal import print_table
from unidiff_sdk.datasets.reader import InvalidRow, describe_problems

if TYPE_CHECKING:
    from rich.progress import Progress

    from unidiff_sdk.training.runtime.callbacks import StepReport

__all__ = ["Display", "LossDisplay", "progress_display", "show_figures", "show_invalid_rows"]

T = TypeVar("T")
SHOWN_PROBLEMS = 5
SHOWN_CHARACTERS = 24  # of a value in a table, so that hashes leave room for the names
SMOOTHING = 0.95


class Display:
    """The task that a command works on: a bar on a terminal, otherwise a line every 30 seconds.

    Args:
        bar: None without a terminal.
        lines: None on a terminal.
    """

    def __init__(self, bar: Progress | None, lines: ProgressLines | None) -> None:
        self._bar, self._lines = bar, lines

    def show(self, description: str, total: int | None = None) -> None:
        """Replace the displayed task."""
        if self._lines is not None:
            self._lines.update(description)
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(description, total=total, figures="")

    def track(self, items: Iterable[T], total: int, description: str) -> Iterator[T]:
        """The items, with their number while they are consumed."""
        self.show(description, total)
        if self._bar is not None:
            yield from self._bar.track(items, task_id=self._bar.task_ids[-1], total=total)
            return
        started = time.monotonic()
        for done, item in enumerate(items):
            self.show(count_line(description, done, total, time.monotonic() - started))
            yield item

    def update(self, completed: int, total: int, figures: str) -> None:
        """Show the number of training steps and their figures. Without a terminal, also the first and last at once."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[-1], completed=completed, figures=figures)
            return
        line = f"step {completed}/{total}  {figures}"
        self.show(line)
        if completed in (1, total):
            echo(line, err=True)


@contextmanager
def progress_display() -> Iterator[Display]:
    """A display on stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        with ProgressLines() as lines:
            yield _importing(Display(None, lines))
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield _importing(Display(progress, None))


def _importing(display: Display) -> Display:
    display.show("Importing PyTorch")
    return display


class LossDisplay:
    """Smoothed losses and throughput."""

    def __init__(self, display: Display, steps: int) -> None:
        self.display = display
        self.steps = steps
        self.smoothed: dict[str, float] = {}

    def on_step(self, report: StepReport) -> None:
        """Show a step."""
        if not self.smoothed:
            self.display.show("Training", self.steps)
        values = report.losses | {"pairs/s": report.pairs / report.seconds}
        self.smoothed = {
            name: SMOOTHING * self.smoothed.get(name, value) + (1 - SMOOTHING) * value for name, value in values.items()
        }
        figures = "  ".join(f"{name} {value:.3g}" for name, value in self.smoothed.items())
        self.display.update(report.step, self.steps, figures)


def show_invalid_rows(data: Path, rows: list[InvalidRow], file: Path | None = None) -> None:
    """Show why rows were skipped, with the first row and the number of rows. file: where all of them are listed."""
    for line in describe_problems(rows, SHOWN_PROBLEMS):
        echo(f"Skipped {data}, {line}", err=True)
    if len(rows) > 1 and file:
        echo(f"All {len(rows):,} invalid rows: {file}", err=True)


def show_figures(figures: dict[str, Any]) -> None:
    """Print nested figures as a table."""
    print_table(
        ["figure", "value"],
        (
            [name, f"{value:.4g}" if isinstance(value, float) else str(value)[:SHOWN_CHARACTERS]]
            for name, value in _flat(figures)
        ),
    )


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value
