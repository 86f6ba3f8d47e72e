"""Train, evaluate, export and compare before with after: what `pipeline.py` and `real_pictures.py` share.

The console scripts do the work, each as a command that is shown and can be typed by hand.
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
from _page import Row, Section, drawn_card, hit_card
from rich.console import Console
from rich.table import Table

from unidiff_sdk import Catalog

console = Console()

MARK = ".example"

# What is shown of an evaluation: name, path in its JSON, whether more is better.
FIGURES = (
    ("words → picture, R@1", "retrieval.text_to_image.R@1", True),
    ("words → picture, R@10", "retrieval.text_to_image.R@10", True),
    ("words → picture, median rank", "retrieval.text_to_image.median_rank", False),
    ("picture → words, R@1", "retrieval.image_to_text.R@1", True),
    ("generated: type right", "generation.attribute_accuracy.type", True),
    ("generated: main colour right", "generation.attribute_accuracy.colour", True),
    ("generated: pattern right", "generation.attribute_accuracy.pattern", True),
    ("generated: everything right", "generation.attribute_accuracy.all", True),
    ("generated: KID to the real ones", "generation.kid", False),
    ("effective rank of picture embeddings", "collapse.image_effective_rank", True),
)


@dataclass(frozen=True)
class Tuned:
    """What a run made."""

    checkpoint: Path
    bundle: Path
    seconds: dict[str, float]  # of each command


def emptied(out: Path) -> None:
    """Make way for a new run in `out`, which is removed only if such a run has made it."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MARK).is_file()):
        raise click.UsageError(f"{out} holds something else: choose another --out, or empty it yourself")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).write_text("The folder of an example's run: the next run removes it.\n", encoding="utf-8")


def train_and_export(data: Path, out: Path, *options: str) -> Tuned:
    """Fine-tune the built-in base on `data` and export it: `out`/checkpoint and `out`/bundle."""
    checkpoint, bundle = out / "checkpoint", out / "bundle"
    train = run("unidiff-train", data, "--base", "tiny", "-o", checkpoint, *options)
    export = run("unidiff-export", checkpoint, "-o", bundle, "--overwrite")
    return Tuned(checkpoint, bundle, {"train": train, "export": export})


def evaluate(checkpoint: str | Path, data: Path, json_file: Path, *options: str) -> dict[str, Any]:
    """The figures of `unidiff-evaluate`."""
    run("unidiff-evaluate", checkpoint, data, "--json", json_file, *options, quiet=True)
    figures: dict[str, Any] = json.loads(json_file.read_text(encoding="utf-8"))
    return figures


def run(command: str, *arguments: str | Path, quiet: bool = False) -> float:
    """Show and run one of our console scripts; its seconds. What it says on failure is the last thing said."""
    words = [command, *map(str, arguments)]
    console.print(f"\n[bold]$ {shlex.join(words)}[/]", highlight=False, soft_wrap=True)
    started = time.perf_counter()
    script = Path(sys.executable).with_name(command)
    done = subprocess.run([script, *words[1:]], check=False, stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return time.perf_counter() - started


# --- before and after ------------------------------------------------------------------------------------------------


def before_and_after(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, ...]]:
    """The lines of a table, its head first; figures that the evaluation does not have are left out."""
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
    """The same lines in the terminal."""
    head, *body = lines
    table = Table(*head, title=f"\n{title}", title_justify="left", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in body:
        table.add_row(*line)
    console.print(table)


def compared(folder: Path, tuned: Path, queries: Sequence[str], prompts: Sequence[str]) -> list[Section]:
    """The same searches and generations on `folder`, with the built-in bundle and with the tuned one."""
    found: dict[str, dict[str, Row]] = {}
    drawn: dict[str, dict[str, Row]] = {}
    for name, catalog in catalogs(folder, tuned):
        for query in queries:
            page = catalog.search(query, limit=7)
            code, took = f"{name}.search({query!r}, limit=7)", f"{page.took_ms:.1f} ms"
            found.setdefault(query, {})[name] = Row(code, [hit_card(hit) for hit in page], took)
        for prompt in prompts:
            pictures = catalog.generate(prompt, n=5, seed=7)
            code, took = f"{name}.generate({prompt!r}, n=5, seed=7)", f"{pictures.took_ms / 1000:.2f} s"
            cards = [drawn_card(picture) for picture in pictures]
            drawn.setdefault(prompt, {})[name] = Row(code, cards, took, large=True)
    return [
        Section(
            "The same searches, before and after",
            "The same pictures and words: `base` is the built-in bundle, `tuned` the one that this run made.",
            [row for rows in found.values() for row in rows.values()],
        ),
        Section(
            "The same prompts and seeds, before and after",
            "The figure is each bundle's own cosine between picture and prompt, and is not comparable between the two.",
            [row for rows in drawn.values() for row in rows.values()],
        ),
    ]


def catalogs(folder: Path, tuned: Path) -> Iterator[tuple[str, Catalog]]:
    """The folder indexed with the built-in bundle, then with the tuned one."""
    for name, bundle in (("base", "tiny"), ("tuned", tuned)):
        with Catalog(bundle=bundle) as catalog:
            catalog.add_folder(folder, progress=True)
            yield name, catalog
