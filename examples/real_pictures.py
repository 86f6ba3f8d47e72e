"""The whole line on pictures that this project did not draw: the stamps of Debian's tuxpaint-stamps-default.

Some 780 photographs and drawings of animals, food, signs and things, each with a caption in a text file beside it.
They are fetched with apt-get (or taken from --stamps), turned into an ordinary catalog folder, and split by a hash
of the caption, so that no caption stands on both sides. Then: evaluate, train, evaluate, export, and one catalog
before and after. Needs the environment of `make pipeline`; writes real/, the page to read is real/index.html.

The tiny base has only ever seen drawn clothes and goods. So there are two questions, answered apart: does a shop find
its *own* pictures (which were trained on), and does anything carry over to captions that training never saw?
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import click
from _flow import before_and_after, catalogs, compared, console, emptied, evaluate, show_table, train_and_export
from _page import Page, Section
from PIL import Image

from unidiff_sdk._internal.images import load_image
from unidiff_sdk.datasets.reader import count_rows, read_catalog
from unidiff_sdk.errors import ImageError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")
CACHE = Path(".cache") / PACKAGE
LONGEST_SIDE = 256
TEST_SHARE = 4  # one caption in so many
QUERIES = ("A rose.", "A penguin.", "A tomato.", "The letter B.")
PROMPTS = ("A flower.", "A penguin.", "An orange.", "The letter B.")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--stamps", type=click.Path(path_type=Path), help=f"The stamps' folder; default: {PACKAGE} by apt-get.")
@click.option("--steps", default=600, show_default=True, help="Optimizer steps of the fine-tuning.")
@click.option("--out", default=Path("real"), show_default=True, type=click.Path(path_type=Path))
def main(stamps: Path | None, steps: int, out: Path) -> None:
    """Fine-tune on real pictures and compare before with after."""
    # 1. An ordinary catalog folder, in two parts.
    emptied(out)
    counts = convert(stamps or downloaded(), out)
    console.print(f"{counts['train']} pictures to train on, {counts['test']} held out")

    # 2. Before, training, export, after. The judge knows synthetic products only, so retrieval alone is measured.
    parts = {"its own pictures (trained on)": out / "train", "held-out captions": out / "test"}
    retrieval = ("--prompts", "0")
    before = {
        name: evaluate("tiny", part, out / f"before-{part.name}.json", *retrieval) for name, part in parts.items()
    }
    tuned = train_and_export(out / "train", out, "--steps", str(steps))
    after = {
        name: evaluate(tuned.checkpoint, part, out / f"after-{part.name}.json", *retrieval)
        for name, part in parts.items()
    }
    tables = {f"{name}, {count_rows(parts[name])}": before_and_after(before[name], after[name]) for name in parts}
    tables["kind of thing, by a held-out picture"] = right_kinds(out, tuned.bundle)

    # 3. One catalog with each bundle.
    sections = compared(out / "train", tuned.bundle, QUERIES, PROMPTS)
    page = Page(
        title="Real pictures: before and after",
        text=f"The built-in tiny model, which has only seen synthetic products, was fine-tuned for {steps} steps on "
        f"{counts['train']} photographs and drawings of Debian's {PACKAGE}.",
        note="At 64 pixels and some six million parameters this shows that the line runs on real data, not what real "
        "models can do on it.",
        figures=[
            (str(counts["train"]), "pictures trained on"),
            (str(counts["test"]), "held out"),
            (f"{tuned.seconds['train']:.0f} s", "fine-tuning, with imports"),
            (f"{tuned.seconds['export']:.0f} s", "export and verification"),
        ],
        sections=[*(Section(name.capitalize(), "", table=table) for name, table in tables.items()), *sections],
        footer=[f"Pictures: {PACKAGE}, by its many authors; see the package's copyright file."],
    )
    for name, table in tables.items():
        show_table(table, name)
    console.print(f"\nThe page: [bold]{page.write(out / 'index.html')}[/]")


def downloaded() -> Path:
    """The stamps of the Debian package, fetched and unpacked once."""
    if not (CACHE / STAMPS).is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        for command in (["apt-get", "download", PACKAGE], ["sh", "-c", f"dpkg -x {PACKAGE}_*.deb . && rm *.deb"]):
            if subprocess.run(command, cwd=CACHE, check=False).returncode != 0:
                sys.exit(f"{PACKAGE} could not be fetched: apt-get install {PACKAGE} and pass --stamps /{STAMPS}")
    return CACHE / STAMPS


def convert(stamps: Path, out: Path) -> dict[str, int]:
    """Write `out`/train and `out`/test: pictures flattened over white, captions, and their folders as columns."""
    counts = {"train": 0, "test": 0}
    lines: dict[str, list[str]] = {part: [] for part in counts}
    for picture in sorted(stamps.rglob("*.png")):
        caption = english_caption(picture.with_suffix(".txt"))
        if caption is None:
            continue
        try:
            image = load_image(picture)
        except ImageError as error:
            console.print(f"passed over: {error}")
            continue
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        part = "test" if hashlib.sha256(caption.encode()).digest()[0] % TEST_SHARE == 0 else "train"
        name = f"{counts[part]:04d}.png"
        (out / part).mkdir(parents=True, exist_ok=True)
        square(image).save(out / part / name)
        category, *kind = picture.relative_to(stamps).parts[:-1]
        row = {"file_name": name, "text": caption, "id": picture.relative_to(stamps).as_posix(), "category": category}
        lines[part].append(json.dumps(row | ({"kind": kind[0]} if kind else {}), ensure_ascii=False))
        counts[part] += 1
    if not all(counts.values()):
        sys.exit(f"{stamps}: no png files with captions beside them")
    for part, rows in lines.items():
        (out / part / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return counts


def english_caption(file: Path) -> str | None:
    """The first line, which is English; the others are translations."""
    if not file.is_file():
        return None
    first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return first or None


def square(image: Image.Image) -> Image.Image:
    """Padded with white to a square, since a model sees the square in the middle only."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), "white")
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def right_kinds(out: Path, bundle: Path) -> list[tuple[str, ...]]:
    """How often the nearest pictures of the catalog are of the same category as a held-out picture or caption."""
    rows = list(read_catalog(out / "test"))
    shares: dict[str, list[float]] = {}
    for _, catalog in catalogs(out / "train", bundle):
        for row in rows:
            asked = row.payload["category"]
            for name, hits in (
                ("by picture, first hit", catalog.search(image=row.image(), limit=1)),
                ("by caption, first hit", catalog.search(row.text, limit=1)),
            ):
                shares.setdefault(name, []).append(float(hits[0].payload["category"] == asked))
    lines: list[tuple[str, ...]] = [("", "before", "after")]
    for name, right in shares.items():
        before, after = (sum(half) / len(rows) for half in (right[: len(rows)], right[len(rows) :]))
        lines.append((name, f"{before:.3f}", f"{after:.3f}"))
    return lines


if __name__ == "__main__":
    main()
