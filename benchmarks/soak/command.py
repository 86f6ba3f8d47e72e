"""The command line of the soak test: it runs sections in processes, two at a time, and reports what they recorded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
from provenance import digest
from rich.console import Console

from . import results
from .faults import can_mount
from .mutations import replay
from .sections import SECTIONS, Record, run_section

__all__ = ["main"]

ROOT = results.ROOT
STATE = ROOT / "soak"
_POLL_SECONDS = 0.5
_LINE_SECONDS = 30.0


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="NAME", help="Run these sections; kill- selects all kills.")
@click.option("--minutes", type=click.FloatRange(min=0), help="Stop after this time. The next run continues.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of all random choices.")
@click.option("--short", is_flag=True, help="A few trials of every section, as in CI.")
@click.option("--jobs", type=click.IntRange(min=1), default=2, show_default=True, help="Sections that run at a time.")
@click.option(
    "--state", type=click.Path(path_type=Path), default=STATE, help="Folder of finished trials. Default: soak/."
)
@click.option("--record", is_flag=True, help="Write benchmarks/soak/results.json and docs/results/soak.md.")
@click.option("--replay", "replayed", metavar="FORMAT:CASE", help="Run one mutated input here, with its traceback.")
@click.option("--section", hidden=True)
@click.option("--trials", type=int, hidden=True)
@click.option("--work", type=click.Path(path_type=Path), hidden=True)
def main(
    only: tuple[str, ...],
    minutes: float | None,
    seed: int,
    short: bool,
    jobs: int,
    state: Path,
    record: bool,
    replayed: str | None,
    section: str | None,
    trials: int | None,
    work: Path | None,
) -> None:
    """Try to break the SDK: kills, mutated inputs, threads, full disks and misbehaving servers.

    Takes about an hour on two cores. Trials that were done with the same code and seed are not repeated. The exit code
    is 1 if a trial failed or is missing.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs the `finally` blocks: ends sections, unmounts disks
    if section is not None and trials is not None and work is not None:
        run_section(section, trials, seed, state, work)
        return
    unknown = [name for name in only if not any(known.startswith(name) for known in SECTIONS)]
    if unknown:
        raise click.UsageError(f"--only {unknown[0]}: there is no such section. Sections: {', '.join(SECTIONS)}")
    work = _work_folder()
    try:
        if replayed is not None:
            _replay(replayed, seed, work)
            return
        state = state / f"{_code()}-{seed}{'-short' if short else ''}"
        state.mkdir(parents=True, exist_ok=True)
        planned = {
            name: one.short if short else one.trials
            for name, one in SECTIONS.items()
            if not only or name.startswith(only)
        }
        if any(name.startswith("disk-") for name in planned) and not can_mount(work):
            click.echo(
                "The full disks are left out: this user cannot mount a tmpfs. Run as root to include them.", err=True
            )
            planned = {name: 0 if name.startswith("disk-") else trials for name, trials in planned.items()}
        _run_all(planned, seed, state, work, jobs, minutes)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    result = results.result_of(state, planned, seed, short=short)
    console = Console(soft_wrap=True)
    console.print(results.table(result))
    for name, one in result["sections"].items():
        for group in one["failures"][:5]:
            console.print(f"{name} {group['cases'][:5]}:\n{group['detail']}\n", markup=False, highlight=False)
    if record:
        results.write(result)
        console.print(f"Wrote {results.RESULTS.relative_to(ROOT)} and {results.PAGE.relative_to(ROOT)}")
    failed = sum(one["failed"] for one in result["sections"].values())
    missing = [name for name, one in result["sections"].items() if one["done"] < one["planned"]]
    if failed or missing:
        click.echo(f"{failed:,} failures; {len(missing)} sections are not complete: {', '.join(missing) or 'none'}")
        sys.exit(1)


def _work_folder() -> Path:
    """A new folder in memory if there is one: hundreds of catalogs are written."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    folder = parent / f"unidiff-soak-{os.getpid()}"
    folder.mkdir()
    return folder


def _code() -> str:
    """A digest of the SDK and of this test."""
    sources = ("unidiff_sdk", "export/unidiff_export", "benchmarks/soak", "tests/support")
    return digest(sorted(file for source in sources for file in (ROOT / source).rglob("*.py")))


def _replay(replayed: str, seed: int, work: Path) -> None:
    from .sections import _corpus, _import_libraries

    name, _, case = replayed.partition(":")
    _import_libraries(name == "checkpoint")
    corpus = _corpus(work, name == "checkpoint")
    folder, saved = work / "replay", Path(f"soak-{name}-{case}.input")
    folder.mkdir()
    seconds = replay(name, int(case), seed, corpus, folder, saved)
    click.echo(f"accepted after {seconds:.2f} s; the input is in {saved}")


def _run_all(planned: Mapping[str, int], seed: int, state: Path, work: Path, jobs: int, minutes: float | None) -> None:
    """Run the sections as processes, some at a time, until all are done or the time is over."""
    waiting = [name for name, trials in planned.items() if Record(state, name).read().done < trials]
    running: dict[str, subprocess.Popen[bytes]] = {}
    started = last_line = time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                running[name] = _start(name, planned[name], seed, state, work)
            time.sleep(_POLL_SECONDS)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                code = running.pop(name).returncode
                done = Record(state, name).read()
                ending = "" if code == 0 else f"; ended with exit code {code}, see {work}"
                click.echo(f"{name}: {done.done:,} of {planned[name]:,}, {done.failed:,} failed{ending}", err=True)
            elapsed = time.monotonic() - started
            if minutes is not None and elapsed > 60 * minutes:
                return
            if time.monotonic() - last_line > _LINE_SECONDS:
                last_line = time.monotonic()
                counts = ", ".join(f"{n} {Record(state, n).read().done:,} of {planned[n]:,}" for n in running)
                click.echo(f"{elapsed / 60:.1f} min: {counts}; {len(waiting)} sections wait", err=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def _start(name: str, trials: int, seed: int, state: Path, work: Path) -> subprocess.Popen[bytes]:
    arguments = ["--section", name, "--trials", str(trials), "--seed", str(seed), "--state", str(state)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TMPDIR": str(work)}
    python_path = [str(ROOT), str(ROOT / "export"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(python_path)
    command = [sys.executable, str(Path(__file__).parent), *arguments, "--work", str(work)]
    return subprocess.Popen(command, env=environment)
