"""The teacher's trajectories from noise to image, recorded where the steps of the student begin and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff_sdk.errors import TrainingError
from unidiff_sdk.generation.samplers import Table
from unidiff_sdk.training.config import DistillationConfig
from unidiff_sdk.training.objective.batch import Conditions
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.objective.sampling import denoising_step
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator

__all__ = ["Trajectories", "encode", "record_trajectories", "training_pairs"]

CHUNK = 32  # trajectories per UNet call


@dataclass(frozen=True)
class Trajectories:
    """Recorded trajectories, on the CPU.

    Attributes:
        points: float[n, student_steps + 1, c, h, w], from noise to clean latents.
        captions: int64[n], the row of each trajectory's caption.
    """

    points: Tensor
    captions: Tensor


@torch.no_grad()
def record_trajectories(
    model: JointModel,
    input_ids: Tensor,
    empty_ids: Tensor,
    table: Table,
    config: DistillationConfig,
    *,
    guidance_scale: float,
    progress: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> Trajectories:
    """Denoise `config.trajectories` times with the teacher, for captions in turn.

    Args:
        model: The teacher.
        input_ids: int64[captions, tokens].
        empty_ids: int64[1, tokens], the tokens of "".
        table: Sampler table of the teacher.
        guidance_scale: up to 1, guidance is off, which halves the work.
        progress: Wraps the batches while they are recorded.

    Raises:
        TrainingError: A trajectory is not finite.
    """
    points = torch.empty(config.trajectories, config.student_steps + 1, *model.latent_shape)
    order = _shuffled(len(input_ids), config.seed)
    captions = torch.stack([next(order) for _ in range(config.trajectories)])
    with model.autocast():
        unconditional = model.unconditional(empty_ids.to(model.device)).map(Tensor.float)
    for rows in progress(torch.arange(config.trajectories).split(CHUNK)):
        generator = seeded_generator(config.seed, Purpose.NOISE, int(rows[0]))
        noise = torch.randn(points[rows, 0].shape, generator=generator) * table.init_noise_sigma
        points[rows] = _denoise(
            model, noise, encode(model, input_ids[captions[rows]]), unconditional, table, config, guidance_scale
        )
    if not points.isfinite().all():
        raise TrainingError(
            "The teacher's latents are not finite. Check the images that it generates, or lower --guidance."
        )
    return Trajectories(points, captions)


def _denoise(
    model: JointModel,
    noise: Tensor,
    conditions: Conditions,
    unconditional: Conditions,
    table: Table,
    config: DistillationConfig,
    guidance_scale: float,
) -> Tensor:
    """Latents before each step of the student and after the last: float[n, student_steps + 1, c, h, w], on the CPU."""
    interval = config.teacher_steps // config.student_steps
    x, x0 = noise.to(model.device), None
    points = [noise]
    for step in range(len(table)):
        with model.autocast():
            x, x0 = denoising_step(model, table[step], x, x0, conditions, unconditional, guidance_scale)
        if (step + 1) % interval == 0:
            points.append(x.cpu())
    return torch.stack(points, dim=1)


def training_pairs(trajectories: Trajectories, config: DistillationConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of (trajectory, student step), int64[batch] each. Every pair occurs once per epoch."""
    count = len(trajectories.points) * config.student_steps
    order = _shuffled(count, config.seed)
    while True:
        pairs = torch.stack([next(order) for _ in range(config.batch_size)])
        yield pairs // config.student_steps, pairs % config.student_steps


@torch.no_grad()
def encode(model: JointModel, ids: Tensor) -> Conditions:
    """What conditions the UNet on captions, int64[n, tokens], for whole images."""
    with model.autocast():
        return model.encode_prompts(ids.to(model.device)).map(Tensor.float)


def _shuffled(n: int, seed: int) -> Iterator[Tensor]:
    """0 to n - 1 endlessly, in a new order each epoch."""
    epoch = 0
    while True:
        yield from torch.randperm(n, generator=seeded_generator(seed, Purpose.ORDER, n, epoch))
        epoch += 1
