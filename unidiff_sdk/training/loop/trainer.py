"""The training loop: catalog and base in, tuned checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from unidiff_sdk.datasets.reader import InvalidRow, Row
from unidiff_sdk.datasets.synthetic import CATALOGS
from unidiff_sdk.errors import OptionError, TrainingError
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, recover, require_replaceable, save_checkpoint
from unidiff_sdk.training.config import Prior, TrainingConfig
from unidiff_sdk.training.data.batches import Batches, Pairs, group_keys, load_pairs, recorded, tokenize
from unidiff_sdk.training.data.latents import LatentCache
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.objective.tuning import ADAPTERS, add_adapters, choose_trainable, save_adapters
from unidiff_sdk.training.runtime.allocator import kept_memory
from unidiff_sdk.training.runtime.callbacks import StepReport, Validate
from unidiff_sdk.training.runtime.interrupts import WithinStep, between_steps
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.randomness import Purpose, seed_of

from .learner import Learner
from .model_selection import Looks
from .prior_preservation import draw_prior
from .resume import Progress, read_finished, restore, unfinished, write_state

__all__ = ["StepReport", "Trained", "train"]


@dataclass(frozen=True)
class Trained:
    """The outcome of a run: where the checkpoint lies, and what was used of the data.

    chosen: how its weights were chosen, where it was by looks: "early_stopping", "wise_ft" and their "score".
    """

    path: Path
    steps: int
    pairs: int
    bad: list[InvalidRow]
    losses: dict[str, float]  # of the last step
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
    strict: bool = False,
    resume: bool = False,
    latents: str | Path | None = None,
    prior: Prior | None = None,
    on_rows: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    on_bad_rows: Callable[[Path, list[InvalidRow]], None] = lambda folder, rows: None,
    on_prior: Callable[[range], Iterable[int]] = iter,
    on_start: Callable[[Checkpoint], None] = lambda checkpoint: None,
    on_step: Callable[[StepReport], None] = lambda report: None,
    on_validate: Validate | None = None,
) -> Trained:
    """Fine-tune CLIP and Stable Diffusion of the checkpoint `base` together on the catalog folder `data`.

    Writes the averaged weights to `out` every `config.save_every` steps, at the end, and when interrupted (then raises
    KeyboardInterrupt on). base, clip: see `load_base`. device: "auto", "cpu", "cuda". strict: the first bad row stops
    the run instead of being passed over. resume: go on with the run that `out` holds, if it holds one; on the CPU, the
    weights become the same bit for bit as without the interruption.

    latents: a folder that keeps the VAE's latents for other runs. prior: pairs of the base's own world, learned from
    beside the catalog's.

    on_rows: wraps the rows while they are read. on_bad_rows: told of the rows that are passed over, of the catalog
    and of the prior, as soon as these are read. on_prior: wraps the batches that the base draws for the prior.
    on_start: called with the base once it is loaded. on_step: called after each step. on_validate: measures the model
    before the first step, every `config.validate_every` steps and after the last, and chooses the weights where early
    stopping or WiSE-FT is on, see `Looks`. In several processes, all wrap their rows, and only the main one calls the
    others.

    Raises DataError, CheckpointError, OptionError for what it is given, TrainingError where a loss is not finite or
    `out` holds a run that is not this one; the last good checkpoint then remains.
    """
    config = config or TrainingConfig()
    if prior and not (config.lambda_prior and (config.lambda_is or config.lambda_leash)):
        raise OptionError(
            "a prior teaches by image synthesis and by the leash, and both of them, or itself, have no weight"
        )
    if on_validate is None and (config.patience or config.wise_ft):
        raise OptionError("early stopping and WiSE-FT choose by pairs that are not trained on: name some (--val)")
    started = time.perf_counter()
    out = Path(out)
    processes = Processes.join(device)

    # 1. what is trained, and on what
    if processes.is_main:
        recover(out)
    processes.wait()
    require_replaceable(out)
    goes_on = unfinished(out)
    if goes_on and not resume:
        raise TrainingError(f"{out} holds a run that is not finished: go on with it (--resume), or remove it first")
    checkpoint = load_base(base, clip)
    if processes.is_main:
        on_start(checkpoint)
    if out.exists() and out.samefile(checkpoint.path):
        raise TrainingError(f"{out} is the base itself: name another folder for the result")

    def load(folder: str | Path, **more: Any) -> Pairs:
        read = load_pairs(folder, checkpoint, strict=strict, fit=config.fit, **more)
        if read.bad and processes.is_main:
            on_bad_rows(Path(folder), read.bad)
        return read

    pairs = load(data, progress=on_rows)
    smallest = min(config.batch_size, config.prior_batch or config.batch_size)
    if smallest < processes.world:
        raise OptionError(
            f"a batch of {smallest} cannot be shared among {processes.world} processes: give at least one pair each"
        )
    if len(pairs) < max(2, processes.world):
        raise TrainingError(
            f"{data} holds too few usable pairs, {len(pairs)}: a contrast needs at least two, and every process one"
        )
    groups = group_keys(pairs, config.group)

    # 2. the model; every picture goes through the VAE once, here
    add_adapters(checkpoint, config)
    model = JointModel(checkpoint, config.precision).to(processes.device).train()
    model.vae.eval()
    choose_trainable(model, config)
    if config.checkpoint_activations:
        model.checkpoint_activations()
    empty_ids = tokenize(checkpoint.tokenizer, [""]).to(processes.device)
    size = max(config.batch_size, config.contrastive_batch)
    cache = LatentCache(Path(latents), model) if latents else None

    def batches_of(pairs: Pairs, groups: Sequence[Any], size: int, seed: int) -> Batches:
        return Batches(
            model,
            pairs,
            tokenize(checkpoint.tokenizer, pairs.captions),
            groups,
            size=size,
            flip=config.flip,
            seed=seed,
            cache=cache,
            clip_ids=None if checkpoint.shared_layers else tokenize(checkpoint.clip_tokenizer, pairs.captions),
            leash=config.lambda_leash > 0,
            scratch=out.parent,
        )

    batches, prior_batches = batches_of(pairs, groups, size, config.seed), None
    if prior:
        if processes.is_main:
            draw_prior(prior, model, checkpoint, seed=config.seed, on_batches=on_prior)
        processes.wait()
        prior_pairs = load(prior.folder)
        if len(prior_pairs) < processes.world:
            raise TrainingError(f"{prior.folder} holds too few pairs, {len(prior_pairs)}: every process needs one")
        seed = seed_of(config.seed, Purpose.PRIOR)
        prior_batches = batches_of(prior_pairs, prior_pairs.captions, config.prior_batch or config.batch_size, seed)

    # 3. what learns, from the base or from where the run was stopped
    learner = Learner(model, config, processes)
    looks = Looks(on_validate, learner, checkpoint)
    identity = {
        "base": learner.fingerprint(),
        "data": pairs.fingerprint(),
        "prior": prior_pairs.fingerprint() if prior else None,
        "groups": sha256(batches.groups.numpy().tobytes()).hexdigest() if config.group else None,
    }
    progress = restore(out, learner, looks, identity) if goes_on else Progress()
    if resume and not goes_on and out.exists():
        progress = read_finished(out, config, identity)
        return Trained(out, progress.step, len(pairs), pairs.bad, progress.losses, time.perf_counter() - started)
    saved = progress.step

    def save(*, finished: bool = False, **more: Any) -> None:
        if not processes.is_main:
            return
        meta = _meta(checkpoint, pairs, config, progress, identity, name=out.name, data=Path(data).name) | more
        with learner.ema.applied(model) as current:

            def write_more(folder: Path) -> None:
                save_adapters(checkpoint, folder / ADAPTERS)
                if not finished:
                    write_state(folder, learner, looks, current, progress, identity)

            save_checkpoint(
                out,
                **checkpoint.parts(),
                meta=meta,
                keep=config.keep,
                also=write_more,
            )

    # 4. the loop
    try:
        with kept_memory(), between_steps() as raise_if_interrupted:
            looks.look_if_due(progress.step)
            while progress.step < config.steps and not looks.are_over:
                tick = time.perf_counter()
                losses = learner.step(progress.step, batches, empty_ids, prior_batches)
                progress.step, progress.losses = progress.step + 1, losses
                if processes.is_main:
                    seconds = time.perf_counter() - tick
                    on_step(
                        StepReport(progress.step, config.steps, losses, learner.learning_rate, seconds, batches.size)
                    )
                looks.look_if_due(progress.step)
                if progress.step % config.save_every == 0 and progress.step < config.steps:
                    save()
                    saved = progress.step
                raise_if_interrupted()
    except WithinStep:  # what was saved before is what a run can go on from
        raise
    except KeyboardInterrupt:
        if progress.step:
            save()
        raise
    except (TrainingError, torch.OutOfMemoryError) as error:
        kept = f"the checkpoint of step {saved} is kept at {out}" if saved else "nothing had been saved yet"
        if isinstance(error, torch.OutOfMemoryError):
            raise TrainingError(
                f"{processes.device} has too little memory for step {progress.step + 1}; {kept}. Give "
                "--micro-batch or --checkpoint-activations, which leave the gradients as they are, or --precision bf16"
            ) from error
        raise TrainingError(
            f"{error}, so training stopped; {kept}. Lower the learning rate, or look for broken pictures"
        ) from error

    # 5. the result
    if config.wise_ft and saved < progress.step:
        save()  # the sweep takes many looks: what is learned must not hang on it
    chosen = looks.choose_weights(progress.step)
    save(finished=True, **({"chosen": chosen} if chosen else {}))
    processes.wait()
    seconds = time.perf_counter() - started
    return Trained(out, progress.step, len(pairs), pairs.bad, progress.losses, seconds, chosen)


def _meta(
    base: Checkpoint,
    pairs: Pairs,
    config: TrainingConfig,
    progress: Progress,
    identity: Mapping[str, Any],
    *,
    name: str,
    data: str,
) -> dict[str, Any]:
    drawn = all(payload.get("catalog") in CATALOGS for payload in pairs.payloads)
    # A distilled base no longer draws in its few steps once it is tuned by another loss.
    sampler = None if "teacher" in base.meta else base.meta.get("sampler")
    return ({"sampler": sampler} if sampler else {}) | {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": base.meta.get("name", base.path.name),
        # True where the model has seen nothing but the synthetic catalogs: searching photographs then warns.
        "synthetic": bool(base.meta.get("synthetic")) and drawn,
        "fit": config.fit or base.fit,
        "captions": recorded(pairs.captions),
        "step": progress.step,
        "config": asdict(config),
        "losses": progress.losses,
        "data": {"name": data, "pairs": len(pairs), "bad_rows": len(pairs.bad), "sha256": identity["data"]},
        "identity": dict(identity),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
