"""`unidiff-evaluate`: measure a checkpoint on a catalog."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from unidiff_sdk._internal.text import json_text
from unidiff_sdk.cli.console import Command
from unidiff_sdk.cli.parameters import refuse_options
from unidiff_sdk.datasets.reader import count_rows
from unidiff_sdk.errors import OptionError

from .display import progress_display, show_figures, show_invalid_rows
from .options import CONTEXT, FILE, FOLDER, columns_option, device_option, flag, option, strict_option

__all__ = ["evaluate"]

FORGETTING = "Copying and forgetting"


@click.command(
    cls=Command,
    resuming="Nothing was written.",
    context_settings=CONTEXT,
    epilog="""
    unidiff-evaluate runs/shop products-test --json shop.json
    unidiff-evaluate runs/shop products-test --prompts 0 --model-card
    unidiff-evaluate runs/shop products-test --train-data products --base tiny --base-data other-products
    """,
)
@click.argument("checkpoint")
@click.argument("data", type=FOLDER)
@option("--json", "json_file", type=FILE, metavar="FILE", help="Write all figures to this file.")
@option("--sheet", type=FILE, metavar="FILE", help="Save a contact sheet of generated images to this file.")
@flag("--model-card", help="Add the figures to CHECKPOINT's README.md and unidiff.json.")
@option(
    "--prompts",
    default=100,
    show_default=True,
    metavar="N",
    help="Number of captions to generate images for. 0: measure retrieval only.",
)
@option("--per-prompt", default=2, show_default=True, metavar="N", help="Images per caption.")
@option("--sampler", metavar="NAME", help="Sampler. Default for this and the next two: CHECKPOINT's own.")
@option("--steps", type=int, metavar="N", help="Denoising steps.")
@option("--guidance", type=float, metavar="SCALE", help="Guidance scale. 1: no guidance.")
@option("--seed", default=0, show_default=True, metavar="N", help="Seed of the generated images.")
@option("--limit", type=click.IntRange(min=2), metavar="N", help="Use the first N pairs of DATA only.")
@columns_option("DATA and --train-data")
@strict_option()
@device_option
@option(
    "--train-data",
    type=FOLDER,
    metavar="FOLDER",
    theme=FORGETTING,
    help="Training data of CHECKPOINT, to measure whether generated images are copies.",
)
@option(
    "--base",
    metavar="MODEL",
    theme=FORGETTING,
    help='Checkpoint before tuning ("tiny" or a folder), to measure forgetting. Needs --base-data.',
)
@option(
    "--base-data",
    type=FOLDER,
    metavar="FOLDER",
    theme=FORGETTING,
    help="Data that the base was trained on, to measure forgetting. Needs --base.",
)
def evaluate(
    checkpoint: str,
    data: Path,
    json_file: Path | None,
    sheet: Path | None,
    model_card: bool,
    train_data: Path | None,
    base: str | None,
    base_data: Path | None,
    **options: Any,
) -> None:
    """Measure CHECKPOINT (a folder, or "tiny") on DATA: retrieval, generation, collapse and forgetting.

    A frozen judge rates the generated images, never the CLIP under test. On the synthetic catalogs, an image is
    relevant to a caption if their attributes are equal; on other data, if their captions are.
    """
    if not options["prompts"]:
        generation = "per_prompt", "sampler", "steps", "guidance", "seed", "sheet", "train_data"
        refuse_options("with --prompts 0, which generates no images", *generation)
    if (base is None) != (base_data is None):
        raise OptionError("Measuring forgetting needs both --base and --base-data.")
    if json_file and json_file.is_dir():
        raise OptionError(f"{json_file} is a folder. Name a file for --json.")
    if model_card and not Path(checkpoint).is_dir():
        raise OptionError(f"--model-card changes the folder of a checkpoint, but {checkpoint} is not a folder.")
    for folder in filter(None, (data, train_data, base_data)):
        count_rows(folder)
    with progress_display() as display:
        from unidiff_sdk.training.evaluation.evaluate import evaluate as run

        result = run(
            checkpoint,
            data,
            train_data=train_data,
            base=base,
            base_data=base_data,
            on_stage=display.show,
            **options,
        )
    show_invalid_rows(data, result.invalid_rows)
    show_figures(result.figures)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json_text(result.figures, indent=2) + "\n", encoding="utf-8")
    if sheet and result.sheet:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        result.sheet.save(sheet)
    if model_card:
        from unidiff_sdk.training.checkpoints.model_card import add_evaluation

        add_evaluation(Path(checkpoint), result.figures)
