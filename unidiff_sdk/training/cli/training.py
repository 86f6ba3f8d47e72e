"""`unidiff-train`: fine-tune CLIP and Stable Diffusion together."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import click

from unidiff_sdk.cli.console import MainCommand, echo
from unidiff_sdk.cli.parameters import refuse_options
from unidiff_sdk.datasets.reader import InvalidRow, count_rows
from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.config import Precision, PriorConfig, TrainingConfig
from unidiff_sdk.training.data.remote import local_data

from .display import LossDisplay, progress_display, show_invalid_rows
from .options import (
    BASE_OPTIONS,
    CONTEXT,
    FOLDER,
    base_options,
    columns_option,
    config_option,
    device_option,
    flag,
    option,
    overwrite_option,
    strict_option,
)

if TYPE_CHECKING:
    from unidiff_sdk.training.evaluation.validation import RunCallback
    from unidiff_sdk.training.loop.trainer import TrainingResult
    from unidiff_sdk.training.reporting.run_log import RunLog
    from unidiff_sdk.training.runtime.callbacks import StepReport

__all__ = ["train"]

# Headings of the help.
BASE = "Files of the base"
DATA, COMPONENTS, OPTIMIZER, LOSSES = "Data", "Tuned components", "Optimizer", "Losses"
RSC = "Reciprocal semantic consistency (RSC)"
FORGETTING, MEMORY = "Overfitting and forgetting", "Memory and speed"
VALIDATION, SAVING = "Validation and logs", "Checkpoints"

setting = partial(config_option, config=TrainingConfig)


def component_options(command: Any) -> Any:
    """--lock-*, --lora-* and --lr-* of each component."""
    options = []
    for component, name in {"unet": "the UNet", "text": "the text side", "image": "the image side"}.items():
        rank = f"LoRA rank for {name}. 0: tune all its weights."
        rate = f"Peak learning rate of {name}. 0: --lr."
        options += [
            flag(f"--lock-{component}", theme=COMPONENTS, help=f"Do not tune {name}."),
            setting(f"--lora-{component}", field=f"lora_{component}", theme=COMPONENTS, metavar="RANK", help=rank),
            setting(
                f"--lr-{component}", field=f"learning_rate_{component}", theme=COMPONENTS, metavar="RATE", help=rate
            ),
        ]
    for add in reversed(options):
        command = add(command)
    return command


def _resuming(ctx: click.Context) -> str:
    """How to continue an interrupted run."""
    resume = sys.modules.get("unidiff_sdk.training.loop.resume")  # not imported yet: no step was done
    if resume is None or not resume.unfinished(ctx.params["out"]):
        return "No step was saved."
    words = [word for word in cast(MainCommand, ctx.command).words if word not in ("--resume", "--overwrite")]
    return f"The steps done are saved. Continue with: unidiff-train {shlex.join(words)} --resume"


@click.command(
    resuming=_resuming,
    cls=MainCommand,
    context_settings=CONTEXT,
    epilog="""
    unidiff-train products --base tiny -o runs/shop
    unidiff-train products --base tiny -o runs/shop --val products-val --patience 5
    unidiff-train products --base runs/shop -o runs/shop-2 --steps 1000 --lr 1e-4
    unidiff-train products --base tiny -o runs/clip-only --is 0
    unidiff-train products --base models/siglip-base-patch16-224 -o runs/siglip --is 0
    """,
)
@click.argument("data")
@option(
    "--base",
    required=True,
    metavar="MODEL",
    help='Base model: "tiny", a checkpoint folder, or a Stable Diffusion: diffusers folder, hf:org/name, or one file. '
    "To train search alone: a CLIP or SigLIP.",
)
@option(
    "--clip",
    metavar="MODEL",
    help="CLIP model for a base without one: a folder, hf:org/name, or open_clip:ARCH/TAG-or-file.",
)
@base_options(BASE)
@option("-o", "--out", required=True, type=FOLDER, metavar="FOLDER", help="Folder for the new checkpoint.")
@setting("--steps", field="steps", metavar="N", help="Number of optimizer steps.")
@setting("--batch-size", field="batch_size", metavar="N", help="Pairs per step.")
@setting("--lr", field="learning_rate", metavar="RATE", help="Peak learning rate.")
@setting("--seed", field="seed", metavar="N", help="Random seed. On the CPU, the same seed gives the same weights.")
@flag("--resume", help="Continue the run in --out, if there is one.")
@overwrite_option
@device_option
@option(
    "--group",
    multiple=True,
    metavar="COLUMN",
    theme=DATA,
    help="Pairs with equal values in this column have the same meaning. Repeatable. Default: equal captions.",
)
@setting(
    "--fit",
    field="fit",
    theme=DATA,
    type=click.Choice(["crop", "pad"]),
    help="Make images square: crop to the center, or pad with white. Default: as for the base.",
)
@flag(
    "--aspect-buckets",
    theme=DATA,
    help="Train the generator on rectangles: each batch holds images of similar aspect ratio (up to 2:1), cropped to "
    "one size. CLIP still sees squares.",
)
@flag("--flip", theme=DATA, help="Mirror half of the images. Not for images with text.")
@columns_option("DATA and --val", DATA)
@strict_option(DATA)
@option(
    "--copies",
    type=FOLDER,
    metavar="FOLDER",
    theme=DATA,
    help="Folder for copies of DATA from object storage, which later runs use again. Default: OUT.data.",
)
@option("--latents", type=FOLDER, metavar="FOLDER", theme=DATA, help="Folder that keeps VAE latents for later runs.")
@component_options
@setting("--warmup", field="warmup_steps", metavar="N", theme=OPTIMIZER, help="Steps of linear warm-up.")
@setting("--weight-decay", field="weight_decay", metavar="X", theme=OPTIMIZER, help="AdamW weight decay of matrices.")
@setting("--gradient-clip", field="gradient_clip", metavar="X", theme=OPTIMIZER, help="Maximum gradient norm.")
@setting("--ema", field="ema_decay", metavar="X", theme=OPTIMIZER, help="Decay of the averaged weights that are saved.")
@setting("--itc", field="lambda_itc", metavar="WEIGHT", theme=LOSSES, help="Weight of image-text contrast. 0: off.")
@setting(
    "--hard-negatives",
    field="hard_negatives",
    metavar="K",
    theme=LOSSES,
    help="Images of other meaning, nearest to its caption, that each pair brings into a batch. 0: random batches.",
)
@setting("--is", field="lambda_is", metavar="WEIGHT", theme=LOSSES, help="Weight of image synthesis. 0: off.")
@setting(
    "--min-snr-gamma",
    field="min_snr_gamma",
    metavar="X",
    theme=LOSSES,
    help="γ of min-SNR weighting. 0: no weighting. Not for Stable Diffusion 3.",
)
@setting(
    "--caption-dropout",
    field="caption_dropout",
    metavar="X",
    theme=LOSSES,
    help="Fraction of captions left out, in [0, 1). Guidance needs it.",
)
@setting(
    "--rsc-encoder",
    field="lambda_rsc_encoder",
    metavar="WEIGHT",
    theme=RSC,
    help="Weight of RSC encoder: the encoder learns how the generator ranks images for a caption.",
)
@setting(
    "--rsc-generator",
    field="lambda_rsc_generator",
    metavar="WEIGHT",
    theme=RSC,
    help="Weight of RSC generator: the generator learns how the encoder ranks images for a caption.",
)
@setting(
    "--rsc-reward",
    field="lambda_rsc_reward",
    metavar="WEIGHT",
    theme=RSC,
    help="Weight of RSC reward: the generator learns from the encoder's judgment of its own images.",
)
@setting(
    "--rsc-reward-captions",
    field="rsc_reward_captions",
    metavar="N",
    theme=RSC,
    help="Captions per step to generate images for.",
)
@setting(
    "--rsc-reward-steps", field="rsc_reward_steps", metavar="N", theme=RSC, help="Denoising steps of these images."
)
@setting(
    "--rsc-reward-last",
    field="rsc_reward_last",
    metavar="K",
    theme=RSC,
    help="Last of these steps that gradients pass through.",
)
@setting(
    "--rsc-reward-guidance",
    field="rsc_reward_guidance",
    type=float,
    metavar="SCALE",
    theme=RSC,
    help="Guidance scale of these images. Default: the base's own.",
)
@setting("--rsc-captions", field="rsc_captions", metavar="N", theme=RSC, help="Captions per step that both rank for.")
@setting(
    "--rsc-candidates",
    field="rsc_candidates",
    metavar="N",
    theme=RSC,
    help="Images that both rank for a caption, its own included.",
)
@setting(
    "--rsc-timesteps",
    field="rsc_timesteps",
    metavar="N",
    theme=RSC,
    help="Timesteps of high noise in the generator's score.",
)
@setting("--rsc-warmup", field="rsc_warmup_steps", metavar="N", theme=RSC, help="Steps until RSC has its full weight.")
@setting(
    "--feature-distillation",
    field="lambda_feature_distillation",
    metavar="WEIGHT",
    theme=FORGETTING,
    help="Weight of feature distillation: keep CLIP embeddings close to the base's.",
)
@option(
    "--prior",
    type=FOLDER,
    metavar="FOLDER",
    theme=FORGETTING,
    help="Train on these prior pairs as well: examples of what the base already does well.",
)
@option(
    "--prior-prompt",
    "prior_prompts",
    multiple=True,
    metavar="TEXT",
    theme=FORGETTING,
    help="Let the base generate images for this prompt into --prior before training. Repeatable.",
)
@option(
    "--prior-pairs",
    default=PriorConfig.pairs,
    show_default=True,
    metavar="N",
    theme=FORGETTING,
    help="Number of pairs in --prior after generation.",
)
@setting(
    "--prior-weight",
    field="lambda_prior",
    metavar="WEIGHT",
    theme=FORGETTING,
    help="Weight of a prior pair relative to a pair of DATA.",
)
@setting(
    "--prior-batch", field="prior_batch", metavar="N", theme=FORGETTING, help="Prior pairs per step. 0: --batch-size."
)
@setting(
    "--patience",
    field="patience",
    metavar="N",
    theme=FORGETTING,
    help="Stop after N validations without improvement and keep the best weights. 0: never stop early. Needs --val.",
)
@flag(
    "--wise-ft",
    theme=FORGETTING,
    help="Interpolate between base and tuned weights to the best point on --val, for encoder and generator separately.",
)
@setting(
    "--contrastive-batch",
    field="contrastive_batch",
    metavar="N",
    theme=MEMORY,
    help="Pairs per step in the contrastive term, at least --batch-size. 0: the same.",
)
@setting(
    "--micro-batch",
    field="micro_batch",
    metavar="N",
    theme=MEMORY,
    help="Pairs in memory at a time. The gradients stay those of the whole batch. 0: the whole batch.",
)
@setting(
    "--precision",
    field="precision",
    theme=MEMORY,
    type=click.Choice(get_args(Precision)),
    help="Precision of the forward passes; weights stay fp32. bf16: recent processors and GPUs. fp16: GPUs.",
)
@flag("--checkpoint-activations", theme=MEMORY, help="Recompute activations instead of storing them.")
@flag(
    "--shard",
    theme=MEMORY,
    help="Shard weights, gradients and optimizer state over the processes that torchrun or accelerate starts (FSDP2).",
)
@option("--val", type=FOLDER, metavar="FOLDER", theme=VALIDATION, help="Validation pairs, not trained on.")
@setting("--validate-every", field="validate_every", metavar="N", theme=VALIDATION, help="Steps between validations.")
@option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    theme=VALIDATION,
    help="Generate an image for this prompt at every validation. Repeatable. Default: the first captions of --val.",
)
@option(
    "--tensorboard",
    type=FOLDER,
    metavar="FOLDER",
    theme=VALIDATION,
    help="Write curves and samples for TensorBoard to this folder.",
)
@setting("--save-every", field="save_every", metavar="N", theme=SAVING, help="Steps between checkpoints.")
@setting(
    "--keep", field="keep", metavar="N", theme=SAVING, help="Number of checkpoints to keep. Older ones: OUT.history."
)
def train(
    data: Path | str,
    base: str,
    out: Path,
    copies: Path | None,
    columns: dict[str, str | None] | None,
    strict: bool,
    val: Path | None,
    prompts: tuple[str, ...],
    tensorboard: Path | None,
    prior: Path | None,
    prior_prompts: tuple[str, ...],
    prior_pairs: int,
    **options: Any,
) -> None:
    """Fine-tune CLIP and Stable Diffusion together on DATA, and save a checkpoint.

    DATA is a folder of images with a metadata.jsonl, .csv or .parquet, or a folder of webdataset shards (.tar), or the
    URL of shards in object storage. Each row names an image (file_name) and its caption (text). diffusers and
    transformers load the checkpoint unchanged, and unidiff-export turns it into a bundle. You can interrupt at any
    time: the progress is saved, and --resume continues the run. OUT.log/report.html shows curves and, with --val,
    samples over time, searches and figures before and after.
    """
    request = {name: options.pop(name) for name in ("clip", *BASE_OPTIONS, "device", "resume", "overwrite", "latents")}
    config = TrainingConfig(**options)
    if prior is None:
        refuse_options("without --prior", "prior_pairs", "prior_weight", "lambda_prior", "prior_batch")
    if val is None:
        refuse_options("without --val", "validate_every")
    if val is None and (prompts or config.patience or config.wise_ft):
        raise OptionError("--prompt, --patience and --wise-ft need validation pairs. Add --val FOLDER.")
    data = local_data(data, out, copies)
    _check_folders(data, val, prior, prior_prompts)
    prior_config = PriorConfig(prior, prior_prompts, prior_pairs) if prior else None
    rows = count_rows(data)
    with progress_display() as display, ExitStack() as stack:
        from unidiff_sdk.training.evaluation.validation import Validator
        from unidiff_sdk.training.loop.trainer import train as run
        from unidiff_sdk.training.reporting.run_log import RunLog

        log = RunLog(out.with_name(f"{out.name}.log"), _about(data, base, out, val, config))
        callbacks: list[RunCallback] = [log, *([_tensorboard(tensorboard, stack)] if tensorboard else [])]
        losses = LossDisplay(display, config.steps)

        def on_invalid_rows(folder: Path, invalid: list[InvalidRow]) -> None:
            show_invalid_rows(folder, invalid, log.on_invalid_rows(folder, invalid))

        def on_step(report: StepReport) -> None:
            losses.on_step(report)
            for callback in callbacks:
                callback.on_step(report)

        validation: dict[str, Any] = {
            "prompts": prompts,
            "columns": columns,
            "strict": strict,
            "on_invalid_rows": on_invalid_rows,
        }
        validator = Validator(val, callbacks, **validation) if val else None
        result = run(
            data,
            base,
            out,
            config,
            columns=columns,
            strict=strict,
            **request,
            prior=prior_config,
            on_prior=lambda batches: display.track(batches, len(batches), "Generating prior images (batches)"),
            on_start=lambda checkpoint: echo(checkpoint.describe_sharing(), err=True),
            on_rows=lambda reading: display.track(reading, rows, "Reading images"),
            on_invalid_rows=on_invalid_rows,
            on_step=on_step,
            on_validate=validator,
        )
    _report(result, _finish_log(log, result))


def _check_folders(data: Path, val: Path | None, prior: Path | None, prior_prompts: tuple[str, ...]) -> None:
    """Raise DataError or OptionError for a folder that cannot be read, before PyTorch is imported."""
    count_rows(data)
    if val:
        count_rows(val)
    if prior and not prior_prompts:
        count_rows(prior)
    if prior_prompts and not prior:
        raise OptionError("--prior-prompt generates images into --prior, which is missing. Add --prior FOLDER.")


def _tensorboard(folder: Path, stack: ExitStack) -> RunCallback:
    """TensorBoard output, closed with the stack."""
    from unidiff_sdk.training.reporting.tensorboard import TensorBoard

    return stack.enter_context(closing(TensorBoard(folder)))


def _about(data: Path, base: str, out: Path, val: Path | None, config: TrainingConfig) -> dict[str, Any]:
    """Description of the run for its log."""
    import diffusers
    import torch
    import transformers

    from unidiff_sdk import __version__

    versions = {"unidiff-sdk": __version__, "torch": torch.__version__}
    versions |= {module.__name__: module.__version__ for module in (diffusers, transformers)}
    return {
        "name": out.name,
        "base": Path(base).name,
        "data": data.name,
        "val": val.name if val else None,
        "command": shlex.join(["unidiff-train", *sys.argv[1:]]),
        "config": asdict(config),
        "versions": versions,
    }


def _finish_log(log: RunLog, result: TrainingResult) -> Path | None:
    """Complete the log and write its report. None if this process took no step."""
    from unidiff_sdk.training.reporting.report import write_report

    report = log.folder / "report.html"
    if log.started:
        log.finish(pairs=result.pairs, invalid_rows=len(result.invalid_rows), chosen=result.chosen)
        write_report(log.folder, report)
    return report if report.is_file() else None


def _report(result: TrainingResult, report: Path | None) -> None:
    if os.environ.get("RANK", "0") != "0":  # of several processes, only the main one reports
        return
    skipped = f" ({len(result.invalid_rows):,} invalid rows skipped)" if result.invalid_rows else ""
    echo(f"Trained {result.steps} steps on {result.pairs:,} pairs{skipped} in {result.seconds:.0f} s.")
    echo(f"Checkpoint: {result.path}")
    if stopping := result.chosen.get("early_stopping"):
        echo(f"Early stopping: weights of step {stopping['step']}, validation score {stopping['score']:.3f}")
    for half, sweep in result.chosen.get("wise_ft", {}).items():
        echo(f"WiSE-FT: {sweep['alpha']:.0%} of the change of the {half}")
    if report:
        echo(f"Report: {report}")
    if (result.path / "model_index.json").is_file():
        echo(f"Next: unidiff-evaluate {result.path} DATA, unidiff-export {result.path} -o BUNDLE")
    else:
        echo(f"Next: unidiff-export --clip {result.path} -o BUNDLE")
