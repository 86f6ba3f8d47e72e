"""Train, evaluate, export, and compare before with after: the stages that `pipeline.py` and `real_images.py` share.

The console scripts do the work. Each command is printed as it would be typed in a shell.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from _page import CardRow, Section, generated_card, hit_card
from rich.console import Console
from rich.table import Table

from unidiff_sdk import Catalog

console = Console()

MARK = ".example"

# The figures of an evaluation that are shown: name, path in its JSON, whether more is better.
FIGURES = (
    ("text → image, R@1", "retrieval.text_to_image.R@1", True),
    ("text → image, R@10", "retrieval.text_to_image.R@10", True),
    ("text → image, median rank", "retrieval.text_to_image.median_rank", False),
    ("image → text, R@1", "retrieval.image_to_text.R@1", True),
    ("generated: type right", "generation.attribute_accuracy.type", True),
    ("generated: main color right", "generation.attribute_accuracy.colour", True),
    ("generated: pattern right", "generation.attribute_accuracy.pattern", True),
    ("generated: every attribute right", "generation.attribute_accuracy.all", True),
    ("generated: KID to the real images", "generation.kid", False),
    ("effective rank of the image embeddings", "collapse.image_effective_rank", True),
)


@dataclass(frozen=True)
class Tuned:
    """The results of a fine-tuning run."""

    checkpoint: Path
    bundle: Path
    seconds: dict[str, float]  # by stage: "train", "export"


def clear(out: Path) -> None:
    """Make `out` an empty folder. A folder that holds anything but an earlier run of an example is refused."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise click.UsageError(f"{out} holds other files. Choose another --out, or empty it first.")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("An example writes this folder. Its next run deletes it first.\n", encoding="utf-8")


def train_and_export(data: Path, out: Path, *options: str) -> Tuned:
    """Fine-tune the built-in base on `data` and export it: `out`/checkpoint and `out`/bundle."""
    checkpoint, bundle = out / "checkpoint", out / "bundle"
    train = run("unidiff-train", data, "--base", "tiny", "-o", checkpoint, "--overwrite", *options)
    export = run("unidiff-export", checkpoint, "-o", bundle, "--overwrite")
    return Tuned(checkpoint, bundle, {"train": train, "export": export})


def evaluate(checkpoint: str | Path, data: Path, json_file: Path, *options: str) -> dict[str, Any]:
    """The figures of `unidiff-evaluate`."""
    run("unidiff-evaluate", checkpoint, data, "--json", json_file, *options, quiet=True)
    figures: dict[str, Any] = json.loads(json_file.read_text(encoding="utf-8"))
    return figures


def run(command: str, *arguments: str | Path, quiet: bool = False) -> float:
    """Print and run a console script of this project, and return its seconds. If it fails, exit with its status."""
    line = [command, *map(str, arguments)]
    console.print(f"\n[bold]$ {shlex.join(line)}[/]", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    script = Path(sys.executable).with_name(command)
    done = subprocess.run([script, *line[1:]], check=False, stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return time.perf_counter() - started


# --- before and after ------------------------------------------------------------------------------------------------


def before_and_after(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a table, header first. Figures that one of the evaluations lacks are left out."""
    lines: list[tuple[str, ...]] = [("", "before", "after", "")]
    for name, path, more_is_better in FIGURES:
        old, new = look_up(before, path), look_up(after, path)
        if old is None or new is None:
            continue
        verdict = "same" if old == new else "better" if (new > old) == more_is_better else "worse"
        lines.append((name, f"{old:.4g}", f"{new:.4g}", verdict))
    return lines


def look_up(figures: dict[str, Any], path: str) -> float | None:
    """A figure by its dotted path, or None."""
    value: Any = figures
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return None if value is None else float(value)


def show_table(lines: Sequence[Sequence[str]], title: str) -> None:
    """Print the lines as a table."""
    header, *body = lines
    table = Table(*header, title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in body:
        table.add_row(*line)
    console.print(table)


def comparison(folder: Path, tuned: Path, queries: Sequence[str], prompts: Sequence[str]) -> list[Section]:
    """The same searches and generations on `folder`, with the built-in bundle and with the tuned one."""
    searches: dict[str, list[CardRow]] = {query: [] for query in queries}
    generations: dict[str, list[CardRow]] = {prompt: [] for prompt in prompts}
    for name, catalog in catalogs(folder, tuned):
        for query, rows in searches.items():
            page = catalog.search(query, limit=7)
            code, took = f"{name}.search({query!r}, limit=7)", f"{page.took_ms:.1f} ms"
            rows.append(CardRow(code, [hit_card(hit) for hit in page], took))
        for prompt, rows in generations.items():
            images = catalog.generate(prompt, n=5, seed=7)
            code, took = f"{name}.generate({prompt!r}, n=5, seed=7)", f"{images.took_ms / 1000:.2f} s"
            rows.append(CardRow(code, [generated_card(image) for image in images], took, large=True))
    return [
        Section(
            "The same searches, before and after",
            "The same images and queries. “base” uses the built-in bundle, “tuned” the bundle of this run.",
            [row for rows in searches.values() for row in rows],
        ),
        Section(
            "The same prompts and seeds, before and after",
            "Each score is the cosine between image and prompt by the bundle's own encoder. Scores of different "
            "bundles do not compare.",
            [row for rows in generations.values() for row in rows],
        ),
    ]


def catalogs(folder: Path, tuned: Path) -> Iterator[tuple[str, Catalog]]:
    """The folder indexed with the built-in bundle ("base"), then with the tuned one ("tuned")."""
    for name, bundle in (("base", "tiny"), ("tuned", tuned)):
        with Catalog(bundle=bundle) as catalog:
            catalog.add_folder(folder, progress=True)
            yield name, catalog
