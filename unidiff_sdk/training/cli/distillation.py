"""`unidiff-train distill`: train the UNet to generate in a few steps without guidance."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from unidiff_sdk.cli.console import Command, echo
from unidiff_sdk.datasets.reader import count_rows
from unidiff_sdk.training.config import DistillationConfig

from .display import LossDisplay, progress_display, show_invalid_rows
from .options import (
    CONTEXT,
    FOLDER,
    columns_option,
    config_option,
    device_option,
    option,
    overwrite_option,
    strict_option,
)

__all__ = ["distill"]

setting = partial(config_option, config=DistillationConfig)


def _resuming(ctx: click.Context) -> str:
    out = ctx.params["out"]
    if not out.is_dir():
        return "Nothing was saved."
    return f"The checkpoint so far is {out}. A distillation cannot be continued. Start again with --overwrite."


@click.command(
    resuming=_resuming,
    cls=Command,
    context_settings=CONTEXT,
    epilog="""
    unidiff-train distill runs/shop products -o runs/shop-fast
    unidiff-train distill runs/shop products -o runs/shop-2 --student-steps 2 --trajectories 8192 --steps 6000
    """,
)
@click.argument("checkpoint")
@click.argument("data", type=FOLDER)
@option("-o", "--out", required=True, type=FOLDER, metavar="FOLDER", help="Folder for the distilled checkpoint.")
@setting("--student-steps", field="student_steps", metavar="N", help="Denoising steps after distillation.")
@setting(
    "--teacher-steps",
    field="teacher_steps",
    metavar="N",
    help="Denoising steps of CHECKPOINT, a multiple of --student-steps.",
)
@setting(
    "--guidance",
    field="guidance_scale",
    type=float,
    metavar="SCALE",
    help="Guidance scale of CHECKPOINT, at least 1 (no guidance). Default: its own.",
)
@setting("--trajectories", field="trajectories", metavar="N", help="Images that CHECKPOINT generates as targets.")
@setting("--steps", field="steps", metavar="N", help="Number of optimizer steps.")
@setting("--batch-size", field="batch_size", metavar="N", help="Latent pairs per step.")
@setting("--lr", field="learning_rate", metavar="RATE", help="Peak learning rate.")
@setting("--warmup", field="warmup_steps", metavar="N", help="Steps of linear warm-up.")
@setting("--ema", field="ema_decay", metavar="X", help="Decay of the averaged weights that are saved.")
@setting("--seed", field="seed", metavar="N", help="Random seed. On the CPU, the same seed gives the same weights.")
@setting(
    "--precision",
    field="precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Precision of the forward passes. bf16 is twice as fast on processors that support it.",
)
@overwrite_option
@columns_option()
@strict_option()
@device_option
def distill(
    checkpoint: str,
    data: Path,
    out: Path,
    overwrite: bool,
    columns: dict[str, str | None] | None,
    strict: bool,
    device: str,
    **options: Any,
) -> None:
    """Make a checkpoint generate in few steps without guidance.

    CHECKPOINT is a folder, or "tiny". DATA is a catalog as for training; only its captions are used. The new checkpoint
    has another UNet and another sampler, which unidiff-export, the runtime and diffusers use. After an interrupt, the
    new checkpoint has the steps done so far.
    """
    config = DistillationConfig(**options)
    rows = count_rows(data)
    with progress_display() as display:
        from unidiff_sdk.training.loop.distiller import distill as run

        result = run(
            checkpoint,
            data,
            out,
            config,
            device=device,
            columns=columns,
            strict=strict,
            overwrite=overwrite,
            on_rows=lambda reading: display.track(reading, rows, "Reading captions"),
            on_invalid_rows=show_invalid_rows,
            on_trajectories=lambda batches: display.track(batches, len(batches), "Recording trajectories (batches)"),
            on_step=LossDisplay(display, config.steps).on_step,
        )
    echo(f"Trained {result.steps} steps on {result.captions:,} captions in {result.seconds:.0f} s.")
    echo(f"Checkpoint: {result.path}")
    echo(f"Next: unidiff-export {result.path} -o BUNDLE")
