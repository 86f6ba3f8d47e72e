"""The distillation loop: a tuned checkpoint and a catalog's captions in, a checkpoint that needs few steps out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from unidiff_sdk.datasets.reader import InvalidRow, Row, read_catalog
from unidiff_sdk.errors import DataError, TrainingError
from unidiff_sdk.generation.samplers import Coefficients, Table, advance
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.training.checkpoints.checkpoint import (
    Checkpoint,
    load_checkpoint,
    require_replaceable,
    save_checkpoint,
)
from unidiff_sdk.training.config import DistillationConfig
from unidiff_sdk.training.data.batches import recorded, tokenize
from unidiff_sdk.training.objective.distillation import STUDENT_SAMPLER, distillation, guided, rows_of, tables
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.allocator import kept_memory
from unidiff_sdk.training.runtime.callbacks import StepReport
from unidiff_sdk.training.runtime.interrupts import between_steps
from unidiff_sdk.training.runtime.processes import pick_device
from unidiff_sdk.training.runtime.randomness import Purpose, generator

from .learner import Ema, learning_rate_factor

__all__ = ["Distilled", "Trajectories", "distill", "few_step_scheduler", "record"]

RECORD_BATCH = 32  # trajectories that the teacher walks side by side
GUIDANCE_SCALE = 5.0  # of a teacher whose checkpoint names none


@dataclass(frozen=True)
class Distilled:
    """The outcome of a run: where the checkpoint lies, and what was used of the data."""

    path: Path
    steps: int
    captions: int
    bad: list[InvalidRow]
    loss: float  # of the last step
    seconds: float


@dataclass(frozen=True)
class Trajectories:
    """Where the teacher's walks from noise to picture cross the student's steps.

    points: float[n, student_steps + 1, c, h, w], from noise to clean latents; captions: int64[n], the row of its
    caption. On the CPU.
    """

    points: Tensor
    captions: Tensor


def distill(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    config: DistillationConfig | None = None,
    *,
    device: str = "auto",
    strict: bool = False,
    on_rows: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    on_bad_rows: Callable[[Path, list[InvalidRow]], None] = lambda folder, rows: None,
    on_trajectories: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Distilled:
    """Teach the UNet of `checkpoint` (a folder or "tiny") to draw in few steps what it draws now in many guided ones.

    Of the catalog `data`, the captions are used: the teacher draws its pictures itself. Everything but the UNet stays
    as it is. Writes the averaged weights to `out` at the end, and when interrupted (then raises KeyboardInterrupt on);
    what is written says by which sampler it is to be run, and the runtime and diffusers go by that.

    on_rows: wraps the rows while they are read; on_bad_rows: told of those that are passed over; on_trajectories: wraps
    the batches of the teacher's trajectories while they are recorded. on_step: called after each step.

    Raises DataError, CheckpointError, OptionError for what it is given, TrainingError where the loss is not finite.
    """
    config = config or DistillationConfig()
    started = time.perf_counter()
    out = Path(out)

    # 1. the teacher, and what it is asked for
    require_replaceable(out)
    teacher = load_checkpoint(checkpoint)
    if out.exists() and out.samefile(teacher.path):
        raise TrainingError(f"{out} is the teacher itself: name another folder for the result")
    bad: list[InvalidRow] = []
    captions = [row.text for row in on_rows(read_catalog(data, strict=strict, on_error=bad.append))]
    if not captions:
        raise DataError(f"{data} holds no usable caption" + (f"; the first of its bad rows: {bad[0]}" if bad else ""))
    if bad:
        on_bad_rows(Path(data), bad)
    model = JointModel(teacher, config.precision).to(pick_device(device)).eval()
    scheduler = few_step_scheduler(teacher)
    student_table, teacher_table = tables(
        Schedule.from_config(scheduler.config), config.student_steps, config.teacher_steps
    )
    guidance_scale = config.guidance_scale or teacher.meta.get("sampler", {}).get("guidance_scale", GUIDANCE_SCALE)

    # 2. its trajectories
    input_ids = tokenize(teacher.tokenizer, captions)
    empty_ids = tokenize(teacher.tokenizer, [""])
    trajectories = record(
        model, input_ids, empty_ids, teacher_table, config, guidance_scale=guidance_scale, progress=on_trajectories
    )

    # 3. the student: the same UNet, which the teacher needs no more
    unet = model.unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config))
    ema = Ema(unet, config.ema_decay)
    done, loss = 0, math.nan

    def save() -> None:
        used = {"name": Path(data).name, "captions": len(captions), "bad_rows": len(bad)}
        meta = _meta(teacher, config, guidance_scale, name=out.name, data=used, captions=captions, step=done, loss=loss)
        with ema.applied(unet):
            save_checkpoint(out, **teacher.parts() | {"scheduler": scheduler}, meta=meta)

    # 4. the loop
    pairs = _pairs(trajectories, config)
    try:
        with kept_memory(), between_steps() as raise_if_interrupted:
            for step in range(config.steps):
                tick = time.perf_counter()
                walk, segment = next(pairs)
                z_t, z_s = (trajectories.points[walk, segment + k].to(model.alpha_bar.device) for k in (0, 1))
                states = _states(model, input_ids[trajectories.captions[walk]])
                loss = _step(model, optimizer, rows_of(student_table, segment), z_t, z_s, states, config)
                if not math.isfinite(loss):
                    raise TrainingError(
                        f"the loss became {loss} at step {step + 1} and nothing was saved; lower the learning rate"
                    )
                rate = float(schedule.get_last_lr()[0])
                schedule.step()
                ema.update(unet)
                done = step + 1
                seconds = time.perf_counter() - tick
                on_step(StepReport(done, config.steps, {"distillation": loss}, rate, seconds, len(walk)))
                raise_if_interrupted()
    except KeyboardInterrupt:
        if done:
            save()
        raise

    # 5. the result
    save()
    return Distilled(out, done, len(captions), bad, loss, time.perf_counter() - started)


def few_step_scheduler(teacher: Checkpoint) -> DDIMScheduler:
    """The teacher's noise schedule under the student's sampler.

    It starts at the last timestep, where there is least signal (the "trailing" spacing of Lin et al. 2023,
    arXiv:2305.08891), and ends in clean latents.
    """
    return DDIMScheduler.from_config(
        teacher.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )


@torch.no_grad()
def record(
    model: JointModel,
    input_ids: Tensor,
    empty_ids: Tensor,
    table: Table,
    config: DistillationConfig,
    *,
    guidance_scale: float,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Trajectories:
    """Let the teacher draw `config.trajectories` pictures of captions taken in turn, guided, along `table`.

    input_ids: int64[captions, tokens]; empty_ids: int64[1, tokens], the tokens of "".
    """
    device = model.alpha_bar.device
    side = int(model.unet.config.sample_size)
    every = config.teacher_steps // config.student_steps
    turns = _shuffled(len(input_ids), config.seed)
    captions = torch.stack([next(turns) for _ in range(config.trajectories)])
    empty = _states(model, empty_ids)
    points = torch.empty(config.trajectories, config.student_steps + 1, int(model.unet.config.in_channels), side, side)
    for rows in progress(torch.arange(config.trajectories).split(RECORD_BATCH)):
        noise = torch.randn(points[rows, 0].shape, generator=generator(config.seed, Purpose.NOISE, int(rows[0])))
        points[rows, 0] = noise * table.init_noise_sigma
        x: Any = points[rows, 0].to(device)
        x0: Any = None
        states = _states(model, input_ids[captions[rows]])
        for step in range(len(table)):
            row = Coefficients(*map(float, table[step]))
            t = torch.full((len(x),), row.timestep, device=device)
            with model.autocast():
                output = model.unet(x * row.input_scale, t, states).sample.float()
                if guidance_scale != 1:
                    unconditional = model.unet(x * row.input_scale, t, empty.expand_as(states)).sample.float()
                    output = guided(unconditional, output, guidance_scale)
            x, x0 = advance(row, x, output, x0, None)  # numpy's arithmetic is torch's here
            if (step + 1) % every == 0:
                points[rows, (step + 1) // every] = x.cpu()
    if not points.isfinite().all():
        raise TrainingError("the teacher draws something that is not finite; look at its pictures, or lower --guidance")
    return Trajectories(points, captions)


def _pairs(trajectories: Trajectories, config: DistillationConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Batch after batch of (trajectory, step of the student), int64[batch] each; every pair once in each round."""
    count = len(trajectories.points) * config.student_steps
    turns = _shuffled(count, config.seed)
    while True:
        pairs = torch.stack([next(turns) for _ in range(config.batch_size)])
        yield pairs // config.student_steps, pairs % config.student_steps


def _step(
    model: JointModel,
    optimizer: torch.optim.Optimizer,
    row: Coefficients,
    z_t: Tensor,
    z_s: Tensor,
    states: Tensor,
    config: DistillationConfig,
) -> float:
    """One step of the optimizer; returns the loss before it."""
    row = Coefficients(*(coefficient.to(z_t.device) for coefficient in row))
    t = row.timestep.flatten()
    with model.autocast():
        output = model.unet(z_t * row.input_scale, t, states).sample.float()
    loss = distillation(row, z_t, output, z_s, model.alpha_bar[t.long()])
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.unet.parameters(), config.gradient_clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def _states(model: JointModel, ids: Tensor) -> Tensor:
    """τ(y): what conditions the UNet, float[n, tokens, width]."""
    with model.autocast():
        return model.text_encoder(ids.to(model.alpha_bar.device)).last_hidden_state.float()


def _shuffled(n: int, seed: int) -> Iterator[Tensor]:
    """0 to n - 1 without end, each round in a new order."""
    turn = 0
    while True:
        yield from torch.randperm(n, generator=generator(seed, Purpose.ORDER, n, turn))
        turn += 1


def _meta(
    teacher: Checkpoint,
    config: DistillationConfig,
    guidance_scale: float,
    *,
    name: str,
    data: Mapping[str, Any],
    captions: Sequence[str],
    step: int,
    loss: float,
) -> dict[str, Any]:
    return {
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": teacher.meta.get("base", teacher.meta.get("name", teacher.path.name)),
        "teacher": {"name": teacher.meta.get("name", teacher.path.name), "guidance_scale": guidance_scale},
        "synthetic": bool(teacher.meta.get("synthetic")),
        "fit": teacher.fit,
        "sampler": {"name": STUDENT_SAMPLER, "steps": config.student_steps, "guidance_scale": 1.0},
        "step": step,
        "config": asdict(config),
        "losses": {"distillation": loss},
        "data": dict(data),
        "captions": recorded(captions),
    }
