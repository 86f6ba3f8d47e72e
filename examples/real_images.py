"""`make real`: the same pipeline on images that this project did not render, Debian's tuxpaint-stamps-default.

The package holds some 780 photographs and drawings of animals, food, signs and things, each with a caption in a text
file. They come from apt-get (or --stamps), are converted to a catalog folder, and are split by a hash of the caption,
so that no caption occurs in both splits. Then: evaluate, train, export, evaluate, and one catalog before and after.
Needs the environment of `make pipeline`. Everything is written to real/; open real/index.html.

The tiny base was trained on synthetic clothes and goods only. So two questions are answered separately: does a search
find the images that the model was trained on, and does anything transfer to captions that it was not trained on?
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import click
from _flow import before_and_after, catalogs, clear, comparison, console, evaluate, show_table, train_and_export
from _page import Page, Section
from PIL import Image

from unidiff_sdk._internal.images import load_image
from unidiff_sdk.datasets.reader import count_rows, read_catalog
from unidiff_sdk.errors import ImageError

PACKAGE = "tuxpaint-stamps-default"
STAMPS = Path("usr/share/tuxpaint/stamps")
CACHE = Path(".cache") / PACKAGE
LONGEST_SIDE = 256
TEST_SHARE = 4  # one caption in four is held out
QUERIES = ("A rose.", "A penguin.", "A tomato.", "The letter B.")
PROMPTS = ("A flower.", "A penguin.", "An orange.", "The letter B.")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--stamps", type=click.Path(path_type=Path), help=f"The stamps' folder; default: {PACKAGE} by apt-get.")
@click.option("--steps", default=600, show_default=True, help="Optimizer steps of the fine-tuning.")
@click.option("--out", default=Path("real"), show_default=True, type=click.Path(path_type=Path))
def main(stamps: Path | None, steps: int, out: Path) -> None:
    """Fine-tune on real images and compare before with after."""
    # 1. A catalog folder in two splits.
    clear(out)
    counts = convert(stamps or download(), out)
    console.print(f"{counts['train']} images to train on, {counts['test']} held out")

    # 2. Evaluate, train, export, evaluate. The judge is trained on synthetic products, so only retrieval is measured.
    splits = {"images it was trained on": out / "train", "held-out captions": out / "test"}
    retrieval = ("--prompts", "0")
    before = {
        name: evaluate("tiny", split, out / f"before-{split.name}.json", *retrieval) for name, split in splits.items()
    }
    tuned = train_and_export(out / "train", out, "--steps", str(steps))
    after = {
        name: evaluate(tuned.checkpoint, split, out / f"after-{split.name}.json", *retrieval)
        for name, split in splits.items()
    }
    tables = {f"{name} ({count_rows(splits[name])})": before_and_after(before[name], after[name]) for name in splits}
    tables["first hit of the right kind, by held-out rows"] = right_kinds(out, tuned.bundle)

    # 3. One catalog with each bundle.
    sections = comparison(out / "train", tuned.bundle, QUERIES, PROMPTS)
    page = Page(
        title="Real images: before and after",
        text=f"This run fine-tuned the built-in tiny model, which was trained on synthetic products only, for {steps} "
        f"steps on {counts['train']} photographs and drawings of Debian's {PACKAGE}.",
        note="With 64 pixels and some six million parameters, this shows that the pipeline runs on real data. It does "
        "not show what larger models reach there.",
        figures=[
            (str(counts["train"]), "images to train on"),
            (str(counts["test"]), "held out"),
            (f"{tuned.seconds['train']:.0f} s", "fine-tuning, with imports"),
            (f"{tuned.seconds['export']:.0f} s", "export and verification"),
        ],
        sections=[*(Section(name.capitalize(), "", table=table) for name, table in tables.items()), *sections],
        footer=[f"Images: {PACKAGE}, by its many authors; see the package's copyright file."],
    )
    for name, table in tables.items():
        show_table(table, name)
    console.print(f"\nOpen [bold]{page.write(out / 'index.html')}[/] in a browser.")


def download() -> Path:
    """Fetch and unpack the Debian package once, and return its stamps."""
    if not (CACHE / STAMPS).is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        for command in (["apt-get", "download", PACKAGE], ["sh", "-c", f"dpkg -x {PACKAGE}_*.deb . && rm *.deb"]):
            if subprocess.run(command, cwd=CACHE, check=False).returncode != 0:
                sys.exit(f"Could not fetch {PACKAGE}. Run apt-get install {PACKAGE} and pass --stamps /{STAMPS}.")
    return CACHE / STAMPS


def convert(stamps: Path, out: Path) -> dict[str, int]:
    """Write `out`/train and `out`/test: images flattened over white, captions, and the stamps' folders as columns."""
    counts = {"train": 0, "test": 0}
    lines: dict[str, list[str]] = {split: [] for split in counts}
    for file in sorted(stamps.rglob("*.png")):
        caption = english_caption(file.with_suffix(".txt"))
        if caption is None:
            continue
        try:
            image = load_image(file)
        except ImageError as error:
            console.print(f"skipped: {error}")
            continue
        image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        split = "test" if hashlib.sha256(caption.encode()).digest()[0] % TEST_SHARE == 0 else "train"
        name = f"{counts[split]:04d}.png"
        (out / split).mkdir(parents=True, exist_ok=True)
        square(image).save(out / split / name)
        category, *kind = file.relative_to(stamps).parts[:-1]
        row = {"file_name": name, "text": caption, "id": file.relative_to(stamps).as_posix(), "category": category}
        lines[split].append(json.dumps(row | ({"kind": kind[0]} if kind else {}), ensure_ascii=False))
        counts[split] += 1
    if not all(counts.values()):
        sys.exit(f"{stamps} holds no PNG files with captions next to them.")
    for split, rows in lines.items():
        (out / split / "metadata.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return counts


def english_caption(file: Path) -> str | None:
    """The first line, which is English; the others are translations."""
    if not file.is_file():
        return None
    first = file.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    return first or None


def square(image: Image.Image) -> Image.Image:
    """Pad with white to a square, since the encoder crops to the middle square."""
    side = max(image.size)
    padded = Image.new("RGB", (side, side), "white")
    padded.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return padded


def right_kinds(out: Path, bundle: Path) -> list[tuple[str, ...]]:
    """How often the first hit has the category of the held-out image or caption that it was searched with."""
    rows = list(read_catalog(out / "test"))
    shares: dict[str, list[float]] = {}
    for _, catalog in catalogs(out / "train", bundle):
        for row in rows:
            expected = row.payload["category"]
            for name, hits in (
                ("searched by image", catalog.search(image=row.image(), limit=1)),
                ("searched by caption", catalog.search(row.text, limit=1)),
            ):
                shares.setdefault(name, []).append(float(hits[0].payload["category"] == expected))
    lines: list[tuple[str, ...]] = [("", "before", "after")]
    for name, right in shares.items():
        before, after = (sum(half) / len(rows) for half in (right[: len(rows)], right[len(rows) :]))
        lines.append((name, f"{before:.3f}", f"{after:.3f}"))
    return lines


if __name__ == "__main__":
    main()
