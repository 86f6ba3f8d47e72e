"""Process start to first hit on a catalogue of 1,000 items, and to the first generated picture.

Each figure is the median over fresh processes, files in the page cache, clock started before the process is. Run it in
an environment without PyTorch (`make bench` does), so that nothing is imported by accident.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
from _host import host
from rich.progress import track

ITEMS = 1000

# Each stage is a moment on CLOCK_MONOTONIC, which all processes of a machine share.
CHILD = """
import time; moments = {"interpreter": time.monotonic()}
from unidiff_sdk import Catalog
catalog = Catalog(%r, create=False)
moments["catalogue open"] = time.monotonic()
result = catalog.%s
assert len(result)
moments["%s"] = time.monotonic()
catalog.close()
import json, sys; print(json.dumps(moments)); assert "torch" not in sys.modules
"""
CASES = {
    "first hit": 'search("red striped dress", limit=10)',
    "first picture": 'generate("red striped dress", seed=0)',
}


def shop(folder: Path, items: int, bundle: str | None) -> Path:
    """A catalogue of synthetic products, made once."""
    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render

    chosen = products("fashion-woman", items, seed=1, split="test")
    with Catalog(folder, bundle=bundle) as catalog:
        for start in track(range(0, items, 100), "Indexing"):
            batch = chosen[start : start + 100]
            catalog.add(
                [render(product) for product in batch],
                texts=[product.caption for product in batch],
                ids=[product.id for product in batch],
                payloads=[{"price": product.price, "catalogue": product.catalogue} for product in batch],
            )
    return folder


def one_run(catalogue: Path, name: str) -> dict[str, float]:
    """Seconds from process start to each stage, in one fresh process."""
    code = CHILD % (str(catalogue), CASES[name], name)
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"the measured process failed:\n{done.stderr}")
    return {stage: moment - started for stage, moment in json.loads(done.stdout).items()}


def summary(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Median, best and worst of each stage over the runs, in seconds."""
    columns = {stage: sorted(run[stage] for run in runs) for stage in runs[0]}
    return {
        stage: {
            "median_s": round(statistics.median(seconds), 4),
            "min_s": round(seconds[0], 4),
            "max_s": round(seconds[-1], 4),
        }
        for stage, seconds in columns.items()
    }


@click.command()
@click.option("--runs", default=9, show_default=True, help="Fresh processes for each figure.")
@click.option("--items", default=ITEMS, show_default=True, help="Size of the catalogue.")
@click.option("--bundle", help="Default: the built-in one.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures to this JSON file too.")
def main(runs: int, items: int, bundle: str | None, out: Path | None) -> None:
    """Time a fresh process to its first hit and to its first generated picture."""
    with tempfile.TemporaryDirectory() as temporary:
        catalogue = shop(Path(temporary) / "shop.catalog", items, bundle)
        results = {}
        for name in CASES:
            one_run(catalogue, name)  # fills the page cache and the bytecode caches
            results[name] = summary([one_run(catalogue, name) for _ in range(runs)])
    report = {"benchmark": "cold_start", "items": items, "runs": runs, "results": results, **host()}
    text = json.dumps(report, indent=2)
    click.echo(text)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
