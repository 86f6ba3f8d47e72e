"""Training: fine-tune CLIP and Stable Diffusion together on a catalog."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.datasets.reader import InvalidRow, Row
from unidiff_sdk.errors import CheckpointError, OptionError, TrainingError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.checkpoints.encoders.search_model import SearchModel, TrainableModel, load_trainable
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions
from unidiff_sdk.training.checkpoints.saving import recover_interrupted_save, require_replaceable
from unidiff_sdk.training.config import TERM_TITLES, PriorConfig, TrainingConfig
from unidiff_sdk.training.data.batches import BatchLoader
from unidiff_sdk.training.data.captions import clip_ids, group_keys, prompt_ids
from unidiff_sdk.training.data.latents import LatentCache
from unidiff_sdk.training.data.pairs import Pairs, load_pairs
from unidiff_sdk.training.data.remote import local_data
from unidiff_sdk.training.objective.encoder_model import EncoderModel
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.objective.reward import reward_table
from unidiff_sdk.training.objective.tuning import add_adapters, set_trainable
from unidiff_sdk.training.runtime.callbacks import StepReport, ValidationFunction
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.randomness import Purpose, derive_seed

from .learner import Learner
from .model_selection import ModelSelection
from .prior_preservation import generate_prior
from .resume import unfinished
from .run import TrainingRun

__all__ = ["TrainingResult", "train"]

ENCODER_TERMS = ("itc", "feature_distillation")  # that need no generator


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Attributes:
        path: The checkpoint folder.
        steps: Steps done.
        pairs: Number of pairs in the catalog.
        invalid_rows: Rows of the catalog that were skipped.
        losses: Value of each term in the last step, without its weight.
        seconds: Duration of this call.
        chosen: How the final weights were chosen, if validation chose them: "early_stopping", "wise_ft" and "score".
    """

    path: Path
    steps: int
    pairs: int
    invalid_rows: list[InvalidRow]
    losses: dict[str, float]
    seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)


def train(
    data: str | Path,
    base: str | Path,
    out: str | Path,
    config: TrainingConfig | None = None,
    *,
    device: str = "auto",
    clip: str | Path | None = None,
    variant: str | None = None,
    lora: Sequence[str | Path] = (),
    textual_inversion: Sequence[str | Path] = (),
    vae: str | Path | None = None,
    base_config: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    latents: str | Path | None = None,
    copies: str | Path | None = None,
    prior: PriorConfig | None = None,
    on_rows: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    on_invalid_rows: Callable[[Path, list[InvalidRow]], None] = lambda folder, rows: None,
    on_prior: Callable[[range], Iterable[int]] = iter,
    on_start: Callable[[TrainableModel], None] = lambda checkpoint: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_validate: ValidationFunction | None = None,
) -> TrainingResult:
    """Fine-tune CLIP and Stable Diffusion of a base together on a catalog, and save a checkpoint.

        from unidiff_sdk.training import TrainingConfig, Validator, train

        config = TrainingConfig(steps=1000, learning_rate=1e-4)
        result = train("products", "tiny", "runs/shop", config, on_validate=Validator("products-val"))
        print(result.path, result.losses)

    The averaged weights are saved every `config.save_every` steps, at the end, and on an interrupt, after which
    KeyboardInterrupt is raised again. With several processes, all wrap their rows, and only the main process calls the
    other callbacks.

    Args:
        data: A catalog folder or shards; or the URL of shards or parquet files in object storage, such as
            s3://bucket/shards. They are copied to this machine once, see `copies`.
        base: "tiny", a checkpoint folder, or a Stable Diffusion: a diffusers folder, "hf:org/name", or a single
            safetensors file. See `load_base`. Or a CLIP or SigLIP without a generator, to train search alone: see
            `load_search_model`. All terms that need a generator must then be off.
        out: Folder of the new checkpoint.
        config: Settings. Default: `TrainingConfig()`.
        device: "auto", "cpu" or "cuda".
        clip: CLIP model for a base without one. See `load_base`.
        variant: Variant of the base's weight files, such as "fp16". Default: the main files, or the only variant.
        lora: LoRA files of diffusers, peft or kohya, and adapter folders of peft, to merge into the base: PATH or
            PATH:WEIGHT.
        textual_inversion: Tokens to add to the prompts, in the formats of diffusers or AUTOMATIC1111: FILE or
            FILE:TOKEN.
        vae: VAE to use instead of the base's: a diffusers folder, or a safetensors file.
        base_config: For a base in a single file, the folder of a diffusers pipeline with its configuration. Default:
            the built-in configuration of Stable Diffusion 1.5.
        columns: Names of columns of `data`: {"image": "photo", "text": "title"}. See `read_catalog`.
        strict: Raise for the first invalid row instead of skipping it.
        resume: Continue the run in `out`, if there is one. On the CPU, the final weights equal those of an
            uninterrupted run bit for bit. With another number of processes, they are equal but for rounding.
        overwrite: Replace the checkpoint in `out`, if there is one.
        latents: Folder that keeps VAE latents for later runs.
        copies: Folder for copies of `data` from object storage, which later runs use again. Default: `OUT.data`.
        prior: Prior pairs, trained on as well.
        on_rows: Wraps the rows while they are read.
        on_invalid_rows: Called with the skipped rows of the catalog, and of the prior, once they are read.
        on_prior: Wraps the batches of prior images while they are generated.
        on_start: Called with the base once it is loaded.
        on_step: Called after each step.
        on_validate: Measures the model before the first step, every `config.validate_every` steps and after the last.
            Early stopping and WiSE-FT choose the weights by its score. See `Validator`.

    Raises:
        DataError: A catalog is missing or has no valid row.
        CheckpointError: The base is missing or not supported, or `out` cannot be written or holds a checkpoint.
        OptionError: An argument is out of range.
        TrainingError: A loss is not finite, memory is too small, or `out` holds another run. The last good checkpoint
            remains.
    """
    config = config or TrainingConfig()
    started = time.perf_counter()
    out = checked_path(out, CheckpointError)
    data = local_data(data, out, copies)
    _check_request(config, prior, on_validate, latents)
    if resume and overwrite:
        raise OptionError("resume and overwrite exclude each other: continue the run in out, or replace it.")
    options = BaseOptions.of(
        variant=variant, lora=lora, textual_inversion=textual_inversion, vae=vae, base_config=base_config
    )
    processes = Processes.join(device)
    if config.shard and processes.world_size == 1:
        raise OptionError(
            "shard is set, but there is only one process. Start several (torchrun --nproc-per-node N), or omit it."
        )

    # 1. base and pairs
    checkpoint = _open_base(base, clip, options, out, processes, resume=resume, overwrite=overwrite)
    if isinstance(checkpoint, SearchModel):
        _require_search_terms(checkpoint, config, prior)
    elif checkpoint.is_transformer:
        _require_flow_settings(checkpoint, config)
    if processes.is_main:
        on_start(checkpoint)
    load = partial(_load_pairs, checkpoint, config, processes, strict=strict, on_invalid_rows=on_invalid_rows)
    pairs = load(data, columns=columns, progress=on_rows)
    _require_enough_pairs(pairs, data, config, processes)
    _require_equal_shares(config, len(pairs), processes)
    groups = group_keys(pairs, config.group)

    # 2. model and batches
    model = _build_model(checkpoint, config, processes)
    cache = LatentCache(Path(latents), model) if latents and isinstance(model, JointModel) else None
    make_batches = partial(_make_batches, model, checkpoint, config, cache=cache, scratch=out.parent)
    size = max(config.batch_size, config.contrastive_batch)
    batches = make_batches(pairs, groups, size=size, seed=config.seed, hard_negatives=config.hard_negatives)
    _require_shares(batches, data, processes)
    if processes.is_main:
        _warn_about_lone_images(batches, data)
    prior_pairs, prior_batches = None, None
    if prior:
        _generate_prior(prior, model, checkpoint, config, processes, on_prior)
        prior_pairs = load(prior.folder)
        prior_batches = _make_prior_batches(make_batches, prior_pairs, prior, config, processes)
        _require_shares(prior_batches, prior.folder, processes)

    # 3. the run: new, resumed, or finished already
    learner = Learner(model, config, processes)
    selection = ModelSelection(on_validate, learner, checkpoint)
    empty_ids = prompt_ids(checkpoint, [""]).to(processes.device)
    run = TrainingRun(
        *(out, learner, selection, checkpoint, pairs, data.name, batches, prior_pairs, prior_batches, empty_ids)
    )
    finished = resume and run.resume()

    # 4. the loop, and the choice of the final weights
    if not finished:
        run.train(on_step)
        run.finish()
    return _result(run, started)


def _check_request(
    config: TrainingConfig,
    prior: PriorConfig | None,
    on_validate: ValidationFunction | None,
    latents: str | Path | None,
) -> None:
    if prior and not (config.lambda_prior and (config.lambda_is or config.lambda_feature_distillation)):
        raise OptionError(
            "A prior is given, but no term trains on it. Set lambda_prior, and lambda_is or "
            "lambda_feature_distillation, above 0."
        )
    if on_validate is None and (config.patience or config.wise_ft):
        raise OptionError(
            "Early stopping (patience) and WiSE-FT (wise_ft) choose weights by validation. Give on_validate (--val)."
        )
    if reason := config.without_effect(prior=prior is not None, validation=on_validate is not None):
        raise OptionError(f"{reason} Omit it, or change what it depends on.")
    if latents is not None and not (config.lambda_is or config.ranks):
        raise OptionError("latents has no effect: no term reads VAE latents. Omit it.")


def _open_base(
    base: str | Path,
    clip: str | Path | None,
    options: BaseOptions,
    out: Path,
    processes: Processes,
    *,
    resume: bool,
    overwrite: bool,
) -> TrainableModel:
    """Load the base, once it is sure that the result can be saved to `out`."""
    if processes.is_main:
        recover_interrupted_save(out)
    processes.wait()
    require_replaceable(out)
    if unfinished(out) and not (resume or overwrite):
        raise TrainingError(
            f"{out} holds an unfinished run. Continue it with --resume, or start again with --overwrite."
        )
    checkpoint = load_trainable(base, clip, options)
    if out.exists() and checkpoint.path.exists() and out.samefile(checkpoint.path):
        raise TrainingError(f"{out} is the base itself. Name another folder for the result.")
    require_replaceable(out, overwrite=resume or overwrite)
    return checkpoint


def _require_search_terms(model: SearchModel, config: TrainingConfig, prior: PriorConfig | None) -> None:
    """Raise OptionError for a term, or a prior, that needs the generator which a base does not have."""
    names = [f"lambda_{term}" for term in TERM_TITLES if term not in ENCODER_TERMS]
    if needed := [name for name in names if getattr(config, name)]:
        raise OptionError(
            f"{model.path} has no generator, but these terms need one: {', '.join(needed)}. Set them to 0 to train "
            "search alone (--is 0), or name a base with a generator."
        )
    if prior and prior.prompts:
        raise OptionError(f"{model.path} has no generator for images of prompts. Name a prior folder with images.")


def _require_flow_settings(checkpoint: Checkpoint, config: TrainingConfig) -> None:
    """Raise OptionError for a setting that has no effect on Stable Diffusion 3."""
    if config.min_snr_gamma not in (TrainingConfig.min_snr_gamma, 0):
        raise OptionError(
            f"min_snr_gamma has no effect: {checkpoint.path} is trained by flow matching, whose loss has the same "
            "weight at all timesteps. Omit it."
        )


def _load_pairs(
    checkpoint: TrainableModel,
    config: TrainingConfig,
    processes: Processes,
    folder: Path,
    *,
    strict: bool,
    columns: Mapping[str, str | None] | None = None,
    on_invalid_rows: Callable[[Path, list[InvalidRow]], None],
    progress: Callable[[Iterable[Row]], Iterable[Row]] = iter,
) -> Pairs:
    pairs = load_pairs(
        folder,
        checkpoint,
        columns=columns,
        strict=strict,
        fit=config.fit,
        aspect_buckets=config.aspect_buckets,
        progress=progress,
    )
    if pairs.invalid_rows and processes.is_main:
        on_invalid_rows(folder, pairs.invalid_rows)
    return pairs


def _require_enough_pairs(pairs: Pairs, data: Path, config: TrainingConfig, processes: Processes) -> None:
    smallest = min(config.batch_size, config.prior_batch or config.batch_size)
    if smallest < processes.world_size:
        raise OptionError(
            f"A batch of {smallest} cannot be divided among {processes.world_size} processes. Every process needs at "
            "least one pair; raise the batch size."
        )
    needed = max(2, processes.world_size)
    if len(pairs) < needed:
        raise TrainingError(f"{data} holds too few valid pairs: {len(pairs)}. Training needs at least {needed}.")


def _require_equal_shares(config: TrainingConfig, pairs: int, processes: Processes) -> None:
    """Raise OptionError if processes that share weights would pass different numbers of samples through the models."""
    if not config.shard:
        return
    samples = min(config.batch_size, pairs)
    whole = min(max(config.batch_size, config.contrastive_batch), pairs)
    shared = {
        "batch_size": samples,
        "contrastive_batch": whole,
        "rsc_captions": min(config.rsc_captions, samples) if config.ranks else 0,
        "rsc_reward_captions": min(config.rsc_reward_captions, whole) if config.lambda_rsc_reward else 0,
    }
    _require_divisible(shared, processes)


def _require_divisible(sizes: Mapping[str, int], processes: Processes) -> None:
    for name, size in sizes.items():
        if size % processes.world_size:
            raise OptionError(
                f"{name}: {size} samples cannot be divided equally among {processes.world_size} processes, which shard "
                f"needs. Set it to a multiple of {processes.world_size} (at most the number of pairs)."
            )


def _require_shares(batches: BatchLoader, data: Path, processes: Processes) -> None:
    """Raise TrainingError if a process would have no pair of a batch, as that of a bucket can be small."""
    if batches.buckets and (smallest := batches.buckets.smallest) < processes.world_size:
        raise TrainingError(
            f"{data}: the smallest batch of a bucket has {smallest} pairs, but each of the {processes.world_size} "
            "processes needs one. Use fewer processes, add images of rare aspect ratios, or omit aspect_buckets."
        )


def _warn_about_lone_images(batches: BatchLoader, data: Path) -> None:
    buckets = batches.buckets.buckets if batches.buckets else []
    if alone := sum(len(rows) == 1 for rows in buckets):
        warn(
            f"{data}: no other image is in the aspect-ratio bucket of {alone:,} of the {sum(map(len, buckets)):,} "
            "images, so the terms that compare pairs learn nothing from them"
        )


def _build_model(checkpoint: TrainableModel, config: TrainingConfig, processes: Processes) -> EncoderModel:
    add_adapters(checkpoint, config)
    model: EncoderModel
    if isinstance(checkpoint, SearchModel):
        model = EncoderModel(checkpoint.model, checkpoint.normalization, config.precision)
    else:
        model = JointModel(checkpoint, config.precision)
    model = model.to(processes.device).train()
    set_trainable(model, config)
    if config.lambda_rsc_reward and isinstance(model, JointModel):
        reward_table(model, config)  # an unsupported number of steps is an error now, not after the images are encoded
    if config.checkpoint_activations:
        model.checkpoint_activations()
    return model


def _make_batches(
    model: EncoderModel,
    checkpoint: TrainableModel,
    config: TrainingConfig,
    pairs: Pairs,
    groups: Sequence[Any],
    *,
    size: int,
    seed: int,
    cache: LatentCache | None,
    scratch: Path,
    hard_negatives: int = 0,
) -> BatchLoader:
    return BatchLoader(
        model,
        pairs,
        prompt_ids(checkpoint, pairs.captions),
        groups,
        size=size,
        flip=config.flip,
        seed=seed,
        cache=cache,
        clip_ids=clip_ids(checkpoint, pairs.captions),
        hard_negatives=hard_negatives,
        feature_distillation=config.lambda_feature_distillation > 0,
        scratch=scratch,
    )


def _generate_prior(
    prior: PriorConfig,
    model: EncoderModel,
    checkpoint: TrainableModel,
    config: TrainingConfig,
    processes: Processes,
    on_prior: Callable[[range], Iterable[int]],
) -> None:
    if processes.is_main and isinstance(model, JointModel) and isinstance(checkpoint, Checkpoint):
        generate_prior(prior, model, checkpoint, seed=config.seed, on_batches=on_prior)
    processes.wait()


def _make_prior_batches(
    make_batches: Callable[..., BatchLoader],
    pairs: Pairs,
    prior: PriorConfig,
    config: TrainingConfig,
    processes: Processes,
) -> BatchLoader:
    if len(pairs) < processes.world_size:
        raise TrainingError(
            f"{prior.folder} holds too few valid pairs: {len(pairs)}. Each of the {processes.world_size} processes "
            "needs one."
        )
    size = config.prior_batch or config.batch_size
    if config.shard:
        _require_divisible({"prior_batch": min(size, len(pairs))}, processes)
    return make_batches(pairs, pairs.captions, size=size, seed=derive_seed(config.seed, Purpose.PRIOR))


def _result(run: TrainingRun, started: float) -> TrainingResult:
    return TrainingResult(
        path=run.out,
        steps=run.progress.step,
        pairs=len(run.pairs),
        invalid_rows=run.pairs.invalid_rows,
        losses=run.progress.losses,
        seconds=time.perf_counter() - started,
        chosen=run.chosen,
    )
