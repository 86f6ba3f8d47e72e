"""`make bench`: every benchmark that is not fresh, each within its time, and then the page.

Fresh is a complete result of the same code, machine, versions and threads. What was interrupted, by hand or by its
time running out, goes on after its last row the next time.
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

# Seconds that a benchmark may take on two cores: in all less than 90 minutes.
BUDGETS = {
    "cold_start": 150,
    "few_steps": 660,
    "generate": 480,
    "generate_large": 720,
    "graphs": 240,
    "imagine": 180,
    "indexing": 210,
    "optimizing": 150,
    "search": 600,
    "training_step": 690,
    "unet": 1320,
}
BUDGET = 300
# Too long for this, or in need of a GPU; their results, once measured, stand on the page.
APART = {"gpu", "million"}


def scripts() -> list[Path]:
    """The files here that measure by the harness."""
    measures = re.compile(r"^from harness import (\([^)]*|[^\n]*)\bBenchmark\b", re.MULTILINE)
    files = (file for file in sorted(Path(__file__).parent.glob("*.py")) if file.stem not in APART)
    return [file for file in files if measures.search(file.read_text("utf-8"))]


def run(argv: Sequence[str], budget: float) -> int | None:
    """The exit status of a benchmark; None where its seconds were up.

    However it ends, none of the processes that it started is left to disturb the next.
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
@click.option("--only", help="Those whose name holds this.")
@click.option("--again", is_flag=True, help="Measure also what is fresh.")
def main(only: str | None, again: bool) -> None:
    """Run the benchmarks one after another, then write the page."""
    chosen = [script for script in scripts() if only is None or only in script.stem]
    late = []
    for number, script in enumerate(chosen, start=1):
        told = f"[{number}/{len(chosen)}] {script.stem}"
        if not again and fresh(script):
            click.echo(f"{told}: fresh, passed over", err=True)
            continue
        budget, started = BUDGETS.get(script.stem, BUDGET), time.monotonic()
        click.echo(f"{told}: at most {budget / 60:.0f} minutes", err=True)
        status = run([sys.executable, str(script), *(["--again"] if again else [])], budget)
        if status is None:
            late.append(f"{script.stem} (time is up; the rows so far are kept)")
        elif status:
            late.append(f"{script.stem} (failed)")
        click.echo(f"{told}: {time.monotonic() - started:.0f} s", err=True)
    subprocess.run([sys.executable, ROOT / "benchmarks" / "report.py"], check=True)
    if late:
        sys.exit(f"not finished: {', '.join(late)}. `make bench` goes on from there.")


if __name__ == "__main__":
    main()
