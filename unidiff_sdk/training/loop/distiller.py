"""Distillation: train the UNet of a checkpoint to generate in a few steps, without guidance."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk.datasets.reader import InvalidRow, Row, read_catalog
from unidiff_sdk.errors import CheckpointError, DataError, TrainingError
from unidiff_sdk.generation.samplers import Coefficients
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiff_sdk.training.checkpoints.saving import require_replaceable, save_checkpoint
from unidiff_sdk.training.config import DistillationConfig
from unidiff_sdk.training.data.captions import prompt_ids, representative_captions, warn_about_long_captions
from unidiff_sdk.training.data.pairs import require_captions
from unidiff_sdk.training.objective.distillation import (
    STUDENT_SAMPLER,
    coefficients_at,
    distillation_loss,
    sampler_tables,
)
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.allocator import keep_freed_memory
from unidiff_sdk.training.runtime.attention import ShortAttentionInFloat32
from unidiff_sdk.training.runtime.callbacks import StepReport
from unidiff_sdk.training.runtime.interrupts import deferred_interrupts
from unidiff_sdk.training.runtime.processes import pick_device

from .learner import Ema, learning_rate_factor
from .trajectories import Trajectories, encode, record_trajectories, training_pairs

__all__ = ["DistillationResult", "distill", "few_step_scheduler"]


@dataclass(frozen=True)
class DistillationResult:
    """Result of a distillation run.

    Attributes:
        path: The checkpoint folder.
        steps: Steps done.
        captions: Number of captions in the data.
        invalid_rows: Rows of the data that were skipped.
        loss: Loss of the last step.
        seconds: Duration of the run.
    """

    path: Path
    steps: int
    captions: int
    invalid_rows: list[InvalidRow]
    loss: float
    seconds: float


def distill(
    checkpoint: str | Path,
    data: str | Path,
    out: str | Path,
    config: DistillationConfig | None = None,
    *,
    device: str = "auto",
    columns: Mapping[str, str | None] | None = None,
    strict: bool = False,
    overwrite: bool = False,
    on_rows: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    on_invalid_rows: Callable[[Path, list[InvalidRow]], None] = lambda folder, rows: None,
    on_start: Callable[[Checkpoint], None] = lambda checkpoint: None,
    on_trajectories: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> DistillationResult:
    """Distill a checkpoint: train its UNet to generate in few steps what it now generates in many guided steps.

        from unidiff_sdk.training import DistillationConfig, distill

        result = distill("runs/shop", "products", "runs/shop-fast", DistillationConfig(student_steps=4))
        print(result.path, result.loss)

    Only the UNet and the sampler change. The averaged weights are saved at the end, and on an interrupt, after which
    KeyboardInterrupt is raised again. The saved checkpoint names its sampler, steps and guidance scale. The runtime and
    diffusers use them.

    Args:
        checkpoint: The teacher: a checkpoint folder, or "tiny".
        data: A catalog. Only its captions are used; the teacher generates its images itself.
        out: Folder of the new checkpoint.
        config: Settings. Default: `DistillationConfig()`.
        device: "auto", "cpu" or "cuda".
        columns: Names of columns of `data`, see `read_catalog`.
        strict: Raise for the first invalid row instead of skipping it.
        overwrite: Replace the checkpoint in `out`, if there is one.
        on_rows: Wraps the rows while they are read.
        on_invalid_rows: Called with the skipped rows once the data is read.
        on_start: Called with the teacher once it is loaded.
        on_trajectories: Wraps the batches of the teacher's trajectories while they are recorded.
        on_step: Called after each step.

    Raises:
        DataError: The catalog is missing or has no caption.
        CheckpointError: The teacher is missing, incomplete or Stable Diffusion 3, or `out` cannot be written or holds a
            checkpoint.
        OptionError: An argument is out of range.
        TrainingError: The loss is not finite.
    """
    config = config or DistillationConfig()
    started = time.perf_counter()
    out, data = checked_path(out, CheckpointError), checked_path(data, DataError)

    # 1. teacher and captions
    teacher = _open_teacher(checkpoint, out, overwrite)
    on_start(teacher)
    captions, invalid = _read_captions(data, columns, strict, on_rows)
    if invalid:
        on_invalid_rows(data, invalid)
    warn_about_long_captions([teacher.tokenizer], captions, data)
    model = JointModel(teacher, config.precision).to(pick_device(device)).eval()
    run = _Distillation(model, teacher, captions, config)

    # 2. the teacher's trajectories
    run.record(on_trajectories)

    # 3. the student's steps
    def save() -> None:
        described = {"name": data.name, "captions": len(captions), "invalid_rows": len(invalid)}
        run.save(out, described)

    try:
        run.train(on_step)
    except KeyboardInterrupt:
        if run.done:
            save()
        raise

    # 4. the result
    save()
    return DistillationResult(out, run.done, len(captions), invalid, run.loss, time.perf_counter() - started)


def few_step_scheduler(teacher: Checkpoint) -> DDIMScheduler:
    """Scheduler of the student: the teacher's noise schedule with DDIM.

    It starts at the last timestep, where there is least signal (the "trailing" spacing of Lin et al. 2023,
    arXiv:2305.08891), and ends in clean latents.
    """
    return DDIMScheduler.from_config(
        teacher.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )


def _open_teacher(checkpoint: str | Path, out: Path, overwrite: bool) -> Checkpoint:
    """Load the teacher, once it is sure that the result can be saved to `out`."""
    require_replaceable(out)
    teacher = load_checkpoint(checkpoint)
    if teacher.is_transformer:
        raise CheckpointError(
            f"{teacher.path} is Stable Diffusion 3, which can be trained but not distilled: the student's steps are "
            "those of DDIM. Distill a model with the architecture of Stable Diffusion 1, 2 or XL."
        )
    if out.exists() and out.samefile(teacher.path):
        raise TrainingError(f"{out} is the teacher itself. Name another folder for the result.")
    require_replaceable(out, overwrite=overwrite)
    return teacher


def _read_captions(
    data: Path,
    columns: Mapping[str, str | None] | None,
    strict: bool,
    on_rows: Callable[[Iterable[Row]], Iterable[Row]],
) -> tuple[list[str], list[InvalidRow]]:
    require_captions(columns)
    invalid: list[InvalidRow] = []
    rows = read_catalog(data, columns=columns, strict=strict, on_error=invalid.append)
    captions = [row.text for row in on_rows(rows)]
    if not captions:
        reason = f"The first invalid row: {invalid[0]}" if invalid else "It has no rows."
        raise DataError(f"{data} holds no valid caption. {reason}")
    return captions, invalid


class _Distillation:
    """A distillation run: student and teacher are the same UNet, which the teacher no longer needs once recorded."""

    def __init__(
        self, model: JointModel, teacher: Checkpoint, captions: Sequence[str], config: DistillationConfig
    ) -> None:
        self.model, self.teacher, self.captions, self.config = model, teacher, captions, config
        self.scheduler = few_step_scheduler(teacher)
        schedule = Schedule.from_config(self.scheduler.config)
        self.student_table, self.teacher_table = sampler_tables(schedule, config.student_steps, config.teacher_steps)
        self.guidance_scale: float = config.guidance_scale or teacher.sampler_defaults["guidance_scale"]
        self.input_ids = prompt_ids(teacher, captions)
        self.unet = model.unet
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )
        self.ema = Ema(self.unet, config.ema_decay)
        self.done, self.loss = 0, math.nan

    def record(self, progress: Callable[[Sequence[Tensor]], Iterable[Tensor]]) -> None:
        """Record the teacher's trajectories."""
        self.trajectories: Trajectories = record_trajectories(
            self.model,
            self.input_ids,
            prompt_ids(self.teacher, [""]),
            self.teacher_table,
            self.config,
            guidance_scale=self.guidance_scale,
            progress=progress,
        )

    def train(self, on_step: Callable[[StepReport], None]) -> None:
        """Train the student. Raises TrainingError if the loss is not finite, KeyboardInterrupt on an interrupt."""
        config = self.config
        self.unet.train()
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: learning_rate_factor(step, config))
        pairs = training_pairs(self.trajectories, config)
        with keep_freed_memory(), ShortAttentionInFloat32(), deferred_interrupts() as raise_if_interrupted:
            for step in range(config.steps):
                started = time.perf_counter()
                trajectory, student_step = next(pairs)
                self.loss = self._step(trajectory, student_step)
                if not math.isfinite(self.loss):
                    raise TrainingError(
                        f"The loss is {self.loss} at step {step + 1}. Nothing was saved. Lower the learning rate."
                    )
                rate = float(schedule.get_last_lr()[0])
                schedule.step()
                self.ema.update(self.unet)
                self.done = step + 1
                seconds = time.perf_counter() - started
                losses = {"distillation": self.loss}
                on_step(StepReport(self.done, config.steps, losses, rate, seconds, len(trajectory)))
                raise_if_interrupted()

    def _step(self, trajectory: Tensor, student_step: Tensor) -> float:
        """One optimizer step on a batch of jumps, int64[batch] each. Returns the loss before it."""
        model, points = self.model, self.trajectories.points
        z_t, z_s = (points[trajectory, student_step + k].to(model.device) for k in (0, 1))
        conditions = encode(model, self.input_ids[self.trajectories.captions[trajectory]])
        on_cpu = coefficients_at(self.student_table, student_step)
        coefficients = Coefficients(*(coefficient.to(model.device) for coefficient in on_cpu))
        t = coefficients.timestep.flatten()
        with model.autocast():
            output = model.predict(z_t * coefficients.input_scale, t, conditions).float()
        loss = distillation_loss(coefficients, z_t, output, z_s, model.alpha_bar[t.long()])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.unet.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        return loss.item()

    def save(self, out: Path, data: dict[str, Any]) -> None:
        """Save the averaged weights. data: provenance of the captions."""
        with self.ema.applied(self.unet):
            parts = self.teacher.parts() | {"scheduler": self.scheduler}
            save_checkpoint(out, **parts, meta=self._metadata(out.name, data))

    def _metadata(self, name: str, data: dict[str, Any]) -> dict[str, Any]:
        teacher, config = self.teacher, self.config
        inherited = {"base_model": teacher.meta["base_model"]} if "base_model" in teacher.meta else {}
        return inherited | {
            "name": name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": teacher.meta.get("base", teacher.name),
            "teacher": {"name": teacher.name, "guidance_scale": self.guidance_scale},
            "synthetic": bool(teacher.meta.get("synthetic")),
            "fit": teacher.fit,
            "sampler": {"name": STUDENT_SAMPLER, "steps": config.student_steps, "guidance_scale": 1.0},
            "step": self.done,
            "config": asdict(config),
            "losses": {"distillation": self.loss},
            "data": data,
            "captions": representative_captions(self.captions),
        }
