"""`make pipeline`: fine-tune the tiny base on a small catalog, evaluate before and after, export, search, generate.

The catalog is 200 synthetic products of `fashion-woman`. Everything is written to pipeline/; open pipeline/index.html.
"""

from __future__ import annotations

from pathlib import Path

import click
from _flow import before_and_after, clear, comparison, console, evaluate, run, show_table, train_and_export
from _page import Page, Section

CATALOG = "fashion-woman"
SIZES = {"train": 200, "val": 100, "test": 200}
# The searches run on the test split, which holds products that fit them in every word.
QUERIES = ("red striped tank top", "purple dotted blouse", "long loose blue coat with yellow dots")
PROMPTS = ("purple dotted boots", "a green checked skirt with yellow", "a short loose pink jumpsuit in one colour")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of the fine-tuning.")
@click.option("--prompts", default=100, show_default=True, help="Captions to generate for in each evaluation.")
@click.option("--out", default=Path("pipeline"), show_default=True, type=click.Path(path_type=Path))
def main(steps: int, prompts: int, out: Path) -> None:
    """Write a catalog, fine-tune on it, evaluate, export, search and generate."""
    # 1. A small catalog in three splits that share no product.
    clear(out)
    for split, n in SIZES.items():
        run("unidiff", "dataset", CATALOG, out / split, "--split", split, "--n", str(n))
    test = out / "test"
    generation = ("--prompts", str(prompts), "--train-data", str(out / "train"))

    # 2. Evaluate the base; 3. fine-tune and export it; 4. evaluate the result.
    before = evaluate("tiny", test, out / "before.json", *generation)
    # The final weights lie between the base's and the tuned ones, where the validation split is best.
    tuned = train_and_export(out / "train", out, "--steps", str(steps), "--val", str(out / "val"), "--wise-ft")
    after = evaluate(tuned.checkpoint, test, out / "after.json", *generation)
    table = before_and_after(before, after)

    # 5. Search and generate with both bundles. This needs no PyTorch.
    sections = comparison(test, tuned.bundle, QUERIES, PROMPTS)
    page = Page(
        title="From 200 images to a tuned model that runs without PyTorch",
        text=f"This run fine-tuned the tiny base on {SIZES['train']} pairs of {CATALOG} for {steps} steps, exported "
        f"it, and compared it with the base on {SIZES['test']} products that neither was trained on.",
        note="The catalog is synthetic: rendered drawings with invented brands and prices.",
        figures=[
            (f"{tuned.seconds['train']:.0f} s", "fine-tuning, with imports"),
            (f"{tuned.seconds['export']:.0f} s", "export and verification"),
            *(
                (f"{old} → {new}", name)
                for name, old, new, _ in table[1:]
                if name.endswith(("R@1", "every attribute right"))
            ),
        ],
        sections=[Section("Before and after, on the test split", "By unidiff-evaluate.", table=table), *sections],
        footer=["Written by examples/pipeline.py (make pipeline)."],
    )
    show_table(table, "Before and after, on the test split")
    console.print(f"\nOpen [bold]{page.write(out / 'index.html')}[/] in a browser.")


if __name__ == "__main__":
    main()
