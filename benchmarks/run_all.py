"""`make bench`: run every benchmark that has no fresh result, each within its time budget, then write the page.

A result is fresh if it is complete and comes from the same code, machine and versions. An interrupted benchmark
continues after its last row in the next run.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click
from harness import ROOT, fresh

# Time budgets in seconds on two cores; less than 90 minutes in total. `prepare.py` has created everything that is kept.
BUDGETS = {
    "cold_start": 180,
    "few_steps": 300,
    "generate": 420,
    "generate_large": 750,
    "graphs": 200,
    "imagine": 150,
    "indexing": 240,
    "optimizing": 150,
    "search": 780,
    "training_step": 690,
    "unet": 1500,
}
BUDGET = 300
# Run by hand: they do not fit into 90 minutes, or need a GPU. Their committed results appear on the page.
APART = {"best_of", "bulk", "cached_features", "deleting", "export", "gpu", "million", "rerank"}


def scripts() -> list[Path]:
    """Return the scripts in this folder that use the harness."""
    measures = re.compile(r"^from harness import (\([^)]*|[^\n]*)\bBenchmark\b", re.MULTILINE)
    files = (file for file in sorted(Path(__file__).parent.glob("*.py")) if file.stem not in APART)
    return [file for file in files if measures.search(file.read_text("utf-8"))]


def run(argv: Sequence[str], budget: float) -> int | None:
    """Return the exit status of a benchmark, or None if its time budget ran out.

    All processes that it started are killed at the end, so that none disturbs the next benchmark.
    """
    with subprocess.Popen(argv, cwd=ROOT, start_new_session=True) as process:
        try:
            return process.wait(budget)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@click.command()
@click.option("--only", help="Run only the benchmarks whose name contains this text.")
@click.option("--again", is_flag=True, help="Measure fresh results again, too.")
def main(only: str | None, again: bool) -> None:
    """Run the benchmarks one after another, then write the page."""
    chosen = [script for script in scripts() if only is None or only in script.stem]
    unfinished = []
    for number, script in enumerate(chosen, start=1):
        label = f"[{number}/{len(chosen)}] {script.stem}"
        if not again and fresh(script):
            click.echo(f"{label}: fresh, skipped", err=True)
            continue
        budget, started = BUDGETS.get(script.stem, BUDGET), time.monotonic()
        click.echo(f"{label}: at most {budget / 60:.0f} minutes", err=True)
        status = run([sys.executable, str(script), *(["--again"] if again else [])], budget)
        if status is None:
            unfinished.append(f"{script.stem} (out of time; the rows so far are kept)")
        elif status:
            unfinished.append(f"{script.stem} (failed)")
        click.echo(f"{label}: {time.monotonic() - started:.0f} s", err=True)
    subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py"], check=True)
    if unfinished:
        sys.exit(f"Not finished: {', '.join(unfinished)}. Run `make bench` again to continue.")


if __name__ == "__main__":
    main()
