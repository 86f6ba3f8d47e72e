"""The command: load, a peer, random requests and faults, one after the other."""

from __future__ import annotations

import base64
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from unidiff_sdk import Catalog
from unidiff_sdk.datasets.synthetic import write_catalog

from . import results
from .hostile import attack
from .kills import kill_under_writes
from .load import GENERATING, SEARCHING, measure
from .server import peer_command, started, unidiff_command

SECTIONS = ("load", "peer", "requests", "kills", "attacks")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--short", is_flag=True, help="Twenty seconds of load, and a few trials of the rest.")
@click.option(
    "--minutes", type=click.FloatRange(min=0.1), default=10.0, show_default=True, help="Duration of the load."
)
@click.option("--rate", type=click.FloatRange(min=1), default=25.0, show_default=True, help="Searches per second.")
@click.option("--items", type=click.IntRange(min=50), default=1000, show_default=True, help="Items in the catalog.")
@click.option("--only", type=click.Choice(SECTIONS), multiple=True, help="Run these sections.")
@click.option("--record", is_flag=True, help="Write benchmarks/serving/results.json and docs/results/serving.md.")
def main(short: bool, minutes: float, rate: float, items: int, only: tuple[str, ...], record: bool) -> None:
    """Measure `unidiff serve` under load and under attack, with a server written by hand as its peer."""
    warnings.simplefilter("ignore", UserWarning)
    seconds = 20.0 if short else 60 * minutes
    chosen = only or SECTIONS
    before = results.machine()
    found: dict[str, Any] = {"short": short, "items": items, "rate": rate, "seconds": seconds, "host": before}
    with _workplace(items) as (work, products, catalog):
        if "load" in chosen:
            found["load"] = _load(unidiff_command(catalog), work / "load.log", seconds, rate)
        if "peer" in chosen:
            found["peer"] = _load(peer_command(products), work / "peer.log", seconds / (1 if short else 5), rate)
        if "requests" in chosen:
            found["requests"] = _requests(catalog, work, 400 if short else 10_000)
        if "kills" in chosen:
            found["kills"] = kill_under_writes(catalog, work, 2 if short else 30, seed=0)
        if "attacks" in chosen:
            found["attacks"] = attack(catalog, work, 60 if short else 600, 1 if short else 10)
    found["load_average_after"] = results.machine()["load_1min"]
    click.echo("\n".join(results.page(found)))
    if record:
        results.write(found)


@contextmanager
def _workplace(items: int) -> Iterator[tuple[Path, Path, Path]]:
    """A temporary folder, products in it, and their catalog."""
    work = Path(tempfile.mkdtemp(prefix="unidiff-serving-"))
    try:
        products, catalog = work / "products", work / "shop.catalog"
        write_catalog("fashion-woman", products, n=items, seed=1, split="train")
        with Catalog(catalog) as opened:
            opened.add_folder(products)
        yield work, products, catalog
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _load(command: list[str], log: Path, seconds: float, rate: float) -> dict[str, Any]:
    """Searches alone for a fifth of the time, at least 10 s; then during generations."""
    with started(command, log) as server:
        measure(server, 2.0, rate, generating=GENERATING)  # warm-up
        idle = measure(server, max(10.0, seconds / 5), rate, generating=0)
        return {"idle": idle, "both": measure(server, seconds, rate, generating=GENERATING)}


def _requests(catalog: Path, work: Path, count: int) -> dict[str, Any]:
    """Requests made from the OpenAPI document of a server, until there are `count`."""
    from schemathesis import openapi

    from .fuzzing import Known, Tally, fuzz

    with Catalog(catalog, create=False) as opened:
        hits = opened.browse(limit=opened.count())
        known = Known([str(hit.id) for hit in hits], base64.b64encode(hits[0].image_bytes()).decode())
    options = ("--allow-writes", "--max-images", "1", "--max-size", "64")
    with started(unidiff_command(catalog, *options), work / "requests.log") as server:
        schema = openapi.from_url(f"http://127.0.0.1:{server.port}/v1/openapi.json")
        tally, memory = Tally(), []
        for number in range(1000):
            fuzz(schema, known, 10 if number else 5, number=number, tally=tally)
            known.ids.pop()
            memory.append((tally.total, server.memory()))
            if tally.total >= count:
                break
    statuses: dict[str, int] = {}
    for (_, _, status), times in sorted(tally.statuses.items(), key=lambda each: each[0][2]):
        statuses[str(status)] = statuses.get(str(status), 0) + times
    failures = [f"{operation}: {name}\n{text}" for (operation, name), text in tally.failures.items()]
    return {"requests": tally.total, "statuses": statuses, "failures": failures, "memory": memory}


__all__ = ["GENERATING", "SEARCHING", "main"]
