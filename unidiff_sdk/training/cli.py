"""`unidiff-train` and `unidiff-evaluate`. PyTorch is imported only once the arguments are known to be good."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from unidiff_sdk.cli.console import Command, MainCommand, Option
from unidiff_sdk.datasets.reader import InvalidRow, count_rows
from unidiff_sdk.errors import OptionError

from .config import DistillationConfig, Precision, Prior, Teacher, TrainingConfig

if TYPE_CHECKING:
    from rich.progress import Progress

    from .loop.trainer import StepReport

__all__ = ["distill", "evaluate", "train"]

T = TypeVar("T")
# The headings of the help.
DATA, TUNED, LOSSES, RSC = "Data", "What is tuned", "Losses", "Reciprocal semantic consistency"
SMALL, MEMORY = "Against the dangers of small data", "Memory and speed"
SEEN, KEEPING = "Looking on", "Keeping"
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
DEFAULTS, DISTILLATION = TrainingConfig(), DistillationConfig()
LOG_EVERY = 50  # steps, where the output is a file and not a terminal
SHOWN_BAD_ROWS = 5
SHOWN_CHARACTERS = 24  # of a value in the table, so that hashes leave room for the names


def config_option(
    *names: str, field: str, help: str, defaults: TrainingConfig | DistillationConfig = DEFAULTS, **settings: Any
) -> Callable[[Any], Any]:
    """An option that fills a field of a configuration, with its default and type."""
    default = getattr(defaults, field)
    settings.setdefault("type", type(default))
    return click.option(*names, field, default=default, show_default=True, help=help, cls=Option, **settings)


def flag(name: str, *, theme: str, help: str) -> Callable[[Any], Any]:
    return click.option(name, is_flag=True, cls=Option, theme=theme, help=help)


def part_options(theme: str) -> Callable[[Any], Any]:
    """What is tuned of each part, and how fast."""
    options = []
    for part, name in {"unet": "the UNet", "text": "the text side", "image": "the image side"}.items():
        rank, rate = f"Tune {name} by adapters of this rank; 0: in full.", f"Peak learning rate of {name}; 0: --lr."
        options += [
            flag(f"--lock-{part}", theme=theme, help=f"Leave {name} as it is."),
            config_option(f"--lora-{part}", field=f"lora_{part}", theme=theme, help=rank),
            config_option(f"--lr-{part}", field=f"learning_rate_{part}", theme=theme, help=rate),
        ]

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


device_option = click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True, help="Where to compute."
)
strict_option = click.option("--strict", is_flag=True, help="Stop at the first bad row instead of passing it over.")


@click.command(
    keeps=True,
    cls=MainCommand,
    context_settings=CONTEXT,
    epilog="""
    unidiff-train products --base tiny -o runs/shop
    unidiff-train products --base runs/shop -o runs/shop-2 --steps 1000 --lr 1e-4
    unidiff-train products --base tiny -o runs/clip-alone --is 0 --rsc 0
    """,
)
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "--base",
    required=True,
    help='Where to start: "tiny", a checkpoint, or a Stable Diffusion as a diffusers folder or hub id.',
)
@click.option("--clip", help="Its CLIP, where --base has none: a folder, a hub id, or open_clip:ARCH/TAG-or-file.")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the tuned checkpoint.")
@config_option("--steps", field="steps", help="Optimizer steps.")
@config_option("--batch-size", field="batch_size", help="Pairs a step.")
@config_option("--lr", field="learning_rate", help="Peak learning rate.")
@config_option("--seed", field="seed", help="The same seed gives the same run.")
@click.option("--resume", is_flag=True, help="Go on with the run that OUT holds, if it holds one.")
@device_option
@click.option(
    "--group", multiple=True, cls=Option, theme=DATA, help="Column by which pairs mean the same; default: text."
)
@config_option(
    "--fit",
    field="fit",
    theme=DATA,
    type=click.Choice(["crop", "pad"]),
    help="Make pictures square by cutting the middle out, or by padding with white. Default: as the base's were.",
)
@click.option(
    "--flip", is_flag=True, cls=Option, theme=DATA, help="Mirror half of the pictures. Not where they bear text."
)
@click.option(
    "--strict", is_flag=True, cls=Option, theme=DATA, help="Stop at the first bad row instead of passing it over."
)
@click.option(
    "--latents",
    type=click.Path(path_type=Path),
    cls=Option,
    theme=DATA,
    help="Folder that keeps the VAE's latents for other runs.",
)
@part_options(TUNED)
@config_option("--warmup", field="warmup_steps", theme=TUNED, help="Steps until the peak; a cosine falls from there.")
@config_option("--weight-decay", field="weight_decay", theme=TUNED, help="AdamW's, of matrices only.")
@config_option("--gradient-clip", field="gradient_clip", theme=TUNED, help="The largest norm of a step's gradient.")
@config_option("--itc", field="lambda_itc", theme=LOSSES, help="Weight of image-text contrast. Of any term, 0: off.")
@config_option("--is", field="lambda_is", theme=LOSSES, help="Weight of image synthesis.")
@config_option("--min-snr-gamma", field="min_snr_gamma", theme=LOSSES, help="Min-SNR weighting of timesteps; 0: none.")
@config_option(
    "--caption-dropout", field="caption_dropout", theme=LOSSES, help="Share of captions left out, for guidance."
)
@config_option("--rsc", field="lambda_rsc", theme=RSC, help="Weight of: the generator learns from the encoder.")
@config_option("--rsc-generated", field="lambda_rsc_generated", theme=RSC, help="Weight of its converse.")
@config_option("--rsc-feature", field="lambda_rsc_feature", theme=RSC, help="Weight of its form without decoding.")
@config_option(
    "--rsc-t-max", field="rsc_t_max", theme=RSC, help="The gate: the noisiest timestep whose estimate is used."
)
@config_option(
    "--rsc-samples", field="rsc_samples", theme=RSC, help="At most so many estimates a step are decoded, what it costs."
)
@config_option("--rsc-warmup", field="rsc_warmup_steps", theme=RSC, help="Steps until it has its full weight.")
@config_option(
    "--rsc-teacher",
    field="rsc_teacher",
    theme=RSC,
    type=click.Choice(get_args(Teacher)),
    help="The encoder that the generator learns from: as it is being tuned, its moving average, or the base's.",
)
@config_option("--ema", field="ema_decay", theme=SMALL, help="Decay of the averaged weights that are saved.")
@config_option("--leash", field="lambda_leash", theme=SMALL, help="Weight of: embeddings stay near the base's.")
@click.option(
    "--prior",
    type=click.Path(path_type=Path),
    cls=Option,
    theme=SMALL,
    help="Pairs of the base's own world, a folder as DATA, to be learned from as well.",
)
@click.option(
    "--prior-prompt",
    "prior_prompts",
    multiple=True,
    cls=Option,
    theme=SMALL,
    help="Let the base draw this into --prior before it is tuned.",
)
@click.option(
    "--prior-pairs",
    default=Prior.pairs,
    show_default=True,
    cls=Option,
    theme=SMALL,
    help="Pairs that --prior holds then.",
)
@config_option("--prior-weight", field="lambda_prior", theme=SMALL, help="Weight of its pairs against those of DATA.")
@config_option("--prior-batch", field="prior_batch", theme=SMALL, help="Of its pairs a step; 0: those of --batch-size.")
@config_option(
    "--patience",
    field="patience",
    theme=SMALL,
    help="Stop after so many looks at --val in a row without a better one, and keep the best one's weights; 0: never.",
)
@flag(
    "--wise-ft",
    theme=SMALL,
    help="End between the base's weights and the tuned ones, where --val is best; encoder and generator apart.",
)
@config_option(
    "--contrastive-batch",
    field="contrastive_batch",
    theme=MEMORY,
    help="Pairs a step that are contrasted, at least those of --batch-size; 0: the same.",
)
@config_option(
    "--micro-batch",
    field="micro_batch",
    theme=MEMORY,
    help="Pairs in memory at a time; the gradients stay those of the whole batch. 0: all of a step.",
)
@config_option(
    "--precision",
    field="precision",
    theme=MEMORY,
    type=click.Choice(get_args(Precision)),
    help="Of the models' passes; weights stay fp32. bf16 is for recent processors and GPUs, fp16 for GPUs.",
)
@flag("--checkpoint-activations", theme=MEMORY, help="Compute activations twice instead of keeping them all.")
@click.option(
    "--val", type=click.Path(path_type=Path), cls=Option, theme=SEEN, help="Pairs to measure on, not trained on."
)
@config_option("--validate-every", field="validate_every", theme=SEEN, help="Steps between looks at --val.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    cls=Option,
    theme=SEEN,
    help="Draw this at every look; default: the first captions of --val.",
)
@click.option(
    "--tensorboard",
    type=click.Path(path_type=Path),
    cls=Option,
    theme=SEEN,
    help="Write curves and samples for TensorBoard to this folder.",
)
@config_option("--save-every", field="save_every", theme=KEEPING, help="Steps between checkpoints.")
@config_option("--keep", field="keep", theme=KEEPING, help="Checkpoints that are kept; older ones lie in OUT.history.")
def train(
    data: Path,
    base: str,
    out: Path,
    strict: bool,
    val: Path | None,
    prompts: tuple[str, ...],
    tensorboard: Path | None,
    prior: Path | None,
    prior_prompts: tuple[str, ...],
    prior_pairs: int,
    **options: Any,
) -> None:
    """Fine-tune CLIP and Stable Diffusion together on DATA, a folder of images with a metadata.jsonl, .csv or .parquet,
    or of webdataset shards (.tar).

    Each row of the metadata names an image (file_name) and its caption (text). One checkpoint comes out, which
    diffusers and transformers open as it is, and which unidiff-export turns into a bundle. Interrupt at any time:
    what was learned so far is saved, and --resume goes on from there, as if nothing had happened. OUT.log/report.html
    shows how it went: curves, and with --val samples over time, searches, figures before and after.
    """
    settings = {name: options.pop(name) for name in ("clip", "device", "resume", "latents")}
    config = TrainingConfig(**options)
    rows = count_rows(data)  # a folder that cannot be read is told before PyTorch is imported
    if val:
        count_rows(val)
    elif prompts or config.patience or config.wise_ft:
        raise OptionError("--prompt, --patience and --wise-ft need looks at --val, which is not given")
    if prior and not prior_prompts:
        count_rows(prior)
    elif prior_prompts and not prior:
        raise OptionError("--prior-prompt is drawn into the folder --prior, which is not given")
    with _progress("PyTorch is being imported") as progress, ExitStack() as open_until_the_end:
        from .evaluation.validation import Validator, Watcher
        from .loop.trainer import train as run
        from .reporting.report import write_report
        from .reporting.run_log import RunLog

        log = RunLog(out.with_name(f"{out.name}.log"), _about(data, base, out, val, config))
        report = log.folder / "report.html"
        watchers: list[Watcher] = [log]
        if tensorboard:
            from .reporting.tensorboard import TensorBoard

            watchers.append(open_until_the_end.enter_context(closing(TensorBoard(tensorboard))))
        display = _StepDisplay(progress, config.steps)

        def on_bad_rows(folder: Path, rows: list[InvalidRow]) -> None:
            _tell_bad_rows(folder, rows, log.on_bad_rows(folder, rows))

        validator = Validator(val, watchers, prompts=prompts, strict=strict, on_bad_rows=on_bad_rows) if val else None

        def on_step(report: StepReport) -> None:
            display(report)
            for watcher in watchers:
                watcher.on_step(report)

        result = run(
            data,
            base,
            out,
            config,
            strict=strict,
            **settings,
            prior=Prior(prior, prior_prompts, prior_pairs) if prior else None,
            on_prior=lambda batches: _track(progress, batches, len(batches), "batches of the prior"),
            on_start=lambda checkpoint: click.echo(checkpoint.describe_sharing(), err=True),
            on_rows=lambda read: _track(progress, read, rows, "pictures"),
            on_bad_rows=on_bad_rows,
            on_step=on_step,
            on_validate=validator,
        )
        if log.started:  # by this process, and there were steps to go
            log.finish(pairs=result.pairs, bad_rows=len(result.bad), chosen=result.chosen)
            write_report(log.folder, report)
    if os.environ.get("RANK", "0") != "0":  # of several processes, the main one tells it
        return
    without = f" ({len(result.bad):,} rows passed over)" if result.bad else ""
    click.echo(f"{result.steps} steps on {result.pairs:,} pairs{without} in {result.seconds:.0f} s: {result.path}")
    if stopping := result.chosen.get("early_stopping"):
        click.echo(
            f"Kept: the weights of step {stopping['step']}, the best look, with a score of {stopping['score']:.3f}"
        )
    for half, swept in result.chosen.get("wise_ft", {}).items():
        click.echo(f"Kept of the {half}: {swept['alpha']:.0%} of what was tuned, the rest is the base's")
    if report.is_file():
        click.echo(f"How it went: {report}")
    click.echo(f"Next: unidiff-evaluate {result.path} DATA, unidiff-export {result.path} -o BUNDLE")


def distillation_option(*names: str, **settings: Any) -> Callable[[Any], Any]:
    """An option that fills a field of DistillationConfig."""
    return config_option(*names, defaults=DISTILLATION, **settings)


@click.command(
    keeps=True,
    cls=Command,
    context_settings=CONTEXT,
    epilog="""
    unidiff-train distill runs/shop products -o runs/shop-fast
    unidiff-train distill runs/shop products -o runs/shop-2 --student-steps 2 --trajectories 8192 --steps 6000
    """,
)
@click.argument("checkpoint")
@click.argument("data", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder for the distilled checkpoint."
)
@distillation_option("--student-steps", field="student_steps", help="Steps that a picture will take.")
@distillation_option("--teacher-steps", field="teacher_steps", help="Steps that it takes now, a multiple.")
@distillation_option(
    "--guidance", field="guidance_scale", type=float, help="Guidance scale that is learned. Default: CHECKPOINT's own."
)
@distillation_option("--trajectories", field="trajectories", help="Pictures that CHECKPOINT draws, to be learned from.")
@distillation_option("--steps", field="steps", help="Optimizer steps.")
@distillation_option("--batch-size", field="batch_size", help="Pairs of latents a step.")
@distillation_option("--lr", field="learning_rate", help="Peak learning rate.")
@distillation_option("--warmup", field="warmup_steps", help="Steps until the peak; a cosine falls from there.")
@distillation_option("--ema", field="ema_decay", help="Decay of the averaged weights that are saved.")
@distillation_option("--seed", field="seed", help="The same seed gives the same run.")
@distillation_option(
    "--precision",
    field="precision",
    type=click.Choice(["fp32", "bf16"]),
    help="bf16 is twice as fast where it is native.",
)
@strict_option
@device_option
def distill(checkpoint: str, data: Path, out: Path, strict: bool, device: str, **options: Any) -> None:
    """Teach the UNet of CHECKPOINT (a folder, or "tiny") to draw in four steps without guidance.

    Of DATA, a catalog as for training, only the captions are used. A checkpoint comes out that differs in its UNet
    and in its sampler, which unidiff-export, the runtime and diffusers go by. Interrupt at any time: what was learned
    so far is saved.
    """
    config = DistillationConfig(**options)
    rows = count_rows(data)
    with _progress("PyTorch is being imported") as progress:
        from .loop.distiller import distill as run

        result = run(
            checkpoint,
            data,
            out,
            config,
            device=device,
            strict=strict,
            on_rows=lambda read: _track(progress, read, rows, "captions"),
            on_bad_rows=_tell_bad_rows,
            on_trajectories=lambda batches: _track(progress, batches, len(batches), "batches of trajectories"),
            on_step=_StepDisplay(progress, config.steps),
        )
    click.echo(f"{result.steps} steps on {result.captions:,} captions in {result.seconds:.0f} s: {result.path}")
    click.echo(f"Next: unidiff-export {result.path} -o BUNDLE")


train.add(distill)


@click.command(
    cls=Command,
    context_settings=CONTEXT,
    epilog="""
    unidiff-evaluate runs/shop products-test --json shop.json
    unidiff-evaluate runs/shop products-test --train-data products --base tiny --base-data other-products
    """,
)
@click.argument("checkpoint")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--pictures", type=click.Path(path_type=Path), help="Save a sheet of generated pictures to this file.")
@click.option("--prompts", default=100, show_default=True, help="Captions to generate for; 0: retrieval only.")
@click.option("--per-prompt", default=2, show_default=True, help="Pictures for each caption.")
@click.option("--sampler", help="Default: CHECKPOINT's own, as for the next two.")
@click.option("--steps", type=int, help="Denoising steps.")
@click.option("--guidance", type=float, help="Guidance scale; 1 for none.")
@click.option("--seed", default=0, show_default=True, help="Of the generated pictures.")
@click.option("--limit", type=click.IntRange(min=2), help="Use only the first so many pairs of DATA.")
@click.option("--train-data", type=click.Path(path_type=Path), help="What CHECKPOINT was tuned on: are they copies?")
@click.option("--base", help='The checkpoint before tuning ("tiny" or a folder), for what was forgotten.')
@click.option("--base-data", type=click.Path(path_type=Path), help="Data that the base knows, for what was forgotten.")
@strict_option
@device_option
def evaluate(
    checkpoint: str,
    data: Path,
    json_file: Path | None,
    pictures: Path | None,
    train_data: Path | None,
    base: str | None,
    base_data: Path | None,
    **options: Any,
) -> None:
    """Measure CHECKPOINT (a folder, or "tiny") on DATA: retrieval, generation, collapse and forgetting.

    Generated pictures are judged by a frozen judge of its own, never by the CLIP under test. On the synthetic
    catalogs, a hit is relevant if its attributes are those of the caption; on other data, if its caption is equal.
    """
    if (base is None) != (base_data is None):
        raise OptionError("what was forgotten needs both --base and --base-data")
    if json_file and json_file.is_dir():
        raise OptionError(f"{json_file} is a folder: name a file for --json")
    for folder in filter(None, (data, train_data, base_data)):
        count_rows(folder)
    with _progress("PyTorch is being imported") as progress:
        from .evaluation.evaluate import evaluate as run

        evaluation = run(
            checkpoint,
            data,
            train_data=train_data,
            base=base,
            base_data=base_data,
            on_stage=lambda stage: progress.update(progress.task_ids[-1], description=stage),
            **options,
        )
    _tell_bad_rows(data, evaluation.bad)
    _table(evaluation.figures)
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(evaluation.figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if pictures and evaluation.sheet:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        evaluation.sheet.save(pictures)


# --- what is shown meanwhile -----------------------------------------------------------------------------------------


def _about(data: Path, base: str, out: Path, val: Path | None, config: TrainingConfig) -> dict[str, Any]:
    """What a run's log says of it: what it was asked for, and with what."""
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


@contextmanager
def _progress(description: str) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(description, total=None, figures="")
        yield progress


def _track(progress: Progress, items: Iterable[T], total: int, description: str) -> Iterator[T]:
    _replace_task(progress, description, total)
    yield from progress.track(items, task_id=progress.task_ids[-1], total=total)


def _replace_task(progress: Progress, description: str, total: int | None) -> None:
    for task in progress.task_ids:
        progress.remove_task(task)
    progress.add_task(description, total=total, figures="")


class _StepDisplay:
    """Each loss, smoothed, with throughput: on a terminal as a line that stays, in a file as a line now and then."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self.progress = progress
        self.steps = steps
        self.smooth: dict[str, float] = {}

    def __call__(self, report: StepReport) -> None:
        if not self.smooth:
            _replace_task(self.progress, "training", self.steps)
        now = report.losses | {"pairs/s": report.pairs / report.seconds}
        self.smooth = {name: 0.95 * self.smooth.get(name, value) + 0.05 * value for name, value in now.items()}
        figures = "  ".join(f"{name} {value:.3g}" for name, value in self.smooth.items())
        self.progress.update(self.progress.task_ids[-1], completed=report.step, figures=figures)
        if self.progress.disable and (report.step % LOG_EVERY == 0 or report.step in (1, self.steps)):
            click.echo(f"step {report.step}/{self.steps}  {figures}", err=True)


def _tell_bad_rows(data: Path, bad: list[InvalidRow], file: Path | None = None) -> None:
    """The first few, and how many more there are; all of them are in `file`."""
    for row in bad[:SHOWN_BAD_ROWS]:
        click.echo(f"Passed over: {data}, {row}", err=True)
    if len(bad) > SHOWN_BAD_ROWS:
        where = f", all in {file}" if file else ""
        click.echo(f"… and {len(bad) - SHOWN_BAD_ROWS:,} more rows{where}.", err=True)


def _table(figures: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", box=box.SIMPLE_HEAD)
    for name, value in _flat(figures):
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value)[:SHOWN_CHARACTERS])
    Console().print(table)


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + name, value
