"""Terminal output of the commands: progress, losses, skipped rows and tables of figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from unidiff_sdk.cli.console import echo
from unidiff_sdk.cli.terminal import print_table
from unidiff_sdk.datasets.reader import InvalidRow

if TYPE_CHECKING:
    from rich.progress import Progress

    from unidiff_sdk.training.runtime.callbacks import StepReport

__all__ = ["LossDisplay", "progress_display", "show_figures", "show_invalid_rows", "show_stage", "track"]

T = TypeVar("T")
LOG_INTERVAL = 50  # steps between lines if the output is not a terminal
SHOWN_INVALID_ROWS = 5
SHOWN_CHARACTERS = 24  # of a value in a table, so that hashes leave room for the names
SMOOTHING = 0.95


@contextmanager
def progress_display() -> Iterator[Progress]:
    """A progress display on stderr, hidden if stderr is not a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task("Importing PyTorch", total=None, figures="")
        yield progress


def show_stage(progress: Progress, description: str, total: int | None = None) -> None:
    """Replace the displayed task."""
    for task in progress.task_ids:
        progress.remove_task(task)
    progress.add_task(description, total=total, figures="")


def track(progress: Progress, items: Iterable[T], total: int, description: str) -> Iterator[T]:
    """The items, with a progress bar while they are consumed."""
    show_stage(progress, description, total)
    yield from progress.track(items, task_id=progress.task_ids[-1], total=total)


class LossDisplay:
    """Smoothed losses and throughput: an updated line on a terminal, else a line every `LOG_INTERVAL` steps."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress = progress
        self.steps = steps
        self.smoothed: dict[str, float] = {}

    def on_step(self, report: StepReport) -> None:
        """Show a step."""
        if not self.smoothed:
            show_stage(self.progress, "Training", self.steps)
        values = report.losses | {"pairs/s": report.pairs / report.seconds}
        self.smoothed = {
            name: SMOOTHING * self.smoothed.get(name, value) + (1 - SMOOTHING) * value for name, value in values.items()
        }
        figures = "  ".join(f"{name} {value:.3g}" for name, value in self.smoothed.items())
        self.progress.update(self.progress.task_ids[-1], completed=report.step, figures=figures)
        if self.progress.disable and (report.step % LOG_INTERVAL == 0 or report.step in (1, self.steps)):
            echo(f"step {report.step}/{self.steps}  {figures}", err=True)


def show_invalid_rows(data: Path, rows: list[InvalidRow], file: Path | None = None) -> None:
    """Show the first skipped rows and the number of the others. file: where all of them are listed."""
    for row in rows[:SHOWN_INVALID_ROWS]:
        echo(f"Skipped {data}, {row}", err=True)
    if len(rows) > SHOWN_INVALID_ROWS:
        where = f" All of them: {file}" if file else ""
        echo(f"Skipped {len(rows) - SHOWN_INVALID_ROWS:,} more invalid rows.{where}", err=True)


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
