"""`make pipeline`: fine-tune the tiny base on a small catalog, evaluate before and after, export, search, generate.

The long way round, on 200 synthetic products of `fashion-woman`; everything lands in pipeline/, the page to read is
pipeline/index.html.
"""

from __future__ import annotations

from pathlib import Path

import click
from _flow import before_and_after, compared, console, emptied, evaluate, run, show_table, train_and_export
from _page import Page, Section

CATALOG = "fashion-woman"
SIZES = {"train": 200, "val": 100, "test": 200}
QUERIES = ("red striped dress", "long blue coat with white dots", "orange handbag without pattern")
PROMPTS = ("purple dotted boots", "a green checked skirt with yellow", "a short loose pink jumpsuit in one colour")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of the fine-tuning.")
@click.option("--prompts", default=100, show_default=True, help="Captions to generate for in each evaluation.")
@click.option("--out", default=Path("pipeline"), show_default=True, type=click.Path(path_type=Path))
def main(steps: int, prompts: int, out: Path) -> None:
    """Catalog, fine-tuning, evaluation, export, search and generation in one go."""
    # 1. A small catalog, in three parts that share no product.
    emptied(out)
    for split, n in SIZES.items():
        run("unidiff", "dataset", CATALOG, out / split, "--split", split, "--n", str(n))
    test = out / "test"
    generation = ("--prompts", str(prompts), "--train-data", str(out / "train"))

    # 2. What the base can do; 3. fine-tune it and export it; 4. what it can do now.
    before = evaluate("tiny", test, out / "before.json", *generation)
    # The weights it ends with lie between the base's and the tuned ones, where the validation split is best.
    tuned = train_and_export(out / "train", out, "--steps", str(steps), "--val", str(out / "val"), "--wise-ft")
    after = evaluate(tuned.checkpoint, test, out / "after.json", *generation)
    table = before_and_after(before, after)

    # 5. Search and generate with the bundle, without PyTorch's help.
    sections = compared(test, tuned.bundle, QUERIES, PROMPTS)
    page = Page(
        title="From 200 pictures to a tuned model that runs without PyTorch",
        text=f"The tiny base was fine-tuned on {SIZES['train']} pairs of {CATALOG} for {steps} steps, exported, and "
        f"compared with itself before on {SIZES['test']} products that neither had seen.",
        note="The catalog is synthetic: rendered drawings with invented brands and prices.",
        figures=[
            (f"{tuned.seconds['train']:.0f} s", "fine-tuning, with imports"),
            (f"{tuned.seconds['export']:.0f} s", "export and verification"),
            *(
                (f"{old} → {new}", name)
                for name, old, new, _ in table[1:]
                if name.endswith(("R@1", "everything right"))
            ),
        ],
        sections=[Section("Before and after, on the test split", "By unidiff-evaluate.", table=table), *sections],
        footer=["Made by `make pipeline`."],
    )
    show_table(table, "Before and after, on the test split")
    console.print(f"\nThe page: [bold]{page.write(out / 'index.html')}[/]")


if __name__ == "__main__":
    main()
