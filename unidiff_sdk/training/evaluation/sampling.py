"""Image generation with the PyTorch model, by the same sampler tables as the runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidiff_sdk.generation.samplers import Table, make_table
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.data.captions import prompt_ids
from unidiff_sdk.training.objective.batch import Conditions
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.objective.sampling import denoising_step

__all__ = ["ImageArray", "generate_images", "sampler_settings", "sampler_table"]

CHUNK = 32  # images per UNet call

ImageArray = NDArray[np.uint8]  # [h, w, 3]


def sampler_settings(
    checkpoint: Checkpoint, sampler: str | None = None, steps: int | None = None, guidance: float | None = None
) -> tuple[str, int, float]:
    """(sampler, steps, guidance scale): the arguments, else the checkpoint's own, else the default of the runtime."""
    own = checkpoint.sampler_defaults
    return (
        own["name"] if sampler is None else sampler,
        own["steps"] if steps is None else steps,
        own["guidance_scale"] if guidance is None else guidance,
    )


def sampler_table(checkpoint: Checkpoint, sampler: str, steps: int) -> Table:
    """Sampler table for the checkpoint's noise schedule.

    Raises OptionError for a sampler that the model does not have, or for more steps than the schedule has.
    """
    return make_table(sampler, checkpoint.schedule, steps)


@torch.no_grad()
def generate_images(
    model: JointModel,
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    *,
    table: Table,
    guidance: float,
    seed: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ImageArray]:
    """Generate one image per prompt with classifier-free guidance (Ho & Salimans 2022).

    The noise of image i depends on (seed, i) only.

    Args:
        table: Sampler table, see `sampler_table`.
        guidance: Guidance scale. Up to 1 there is no guidance, at half the work.
        on_progress: Called before each chunk with the numbers of images done and requested.

    Returns:
        uint8[h, w, 3] for each prompt.
    """
    images: list[ImageArray] = []
    unconditional = model.unconditional(prompt_ids(checkpoint, [""]).to(model.device))
    for start in range(0, len(prompts), CHUNK):
        on_progress(start, len(prompts))
        conditions = model.encode_prompts(prompt_ids(checkpoint, prompts[start : start + CHUNK]).to(model.device))
        streams = [np.random.default_rng([seed, start + i]) for i in range(len(conditions))]
        latents = _denoise(model, conditions, unconditional, streams, table, guidance)
        pixels = (model.decode(latents).clamp(0, 1) * 255).round().to(torch.uint8)
        images += list(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return images


def _denoise(
    model: JointModel,
    conditions: Conditions,
    unconditional: Conditions,
    streams: Sequence[np.random.Generator],
    table: Table,
    guidance: float,
) -> Tensor:
    shape = model.latent_shape
    x, x0 = _noise(streams, shape, model.device) * table.init_noise_sigma, None
    for step in range(len(table)):
        noise = _noise(streams, shape, model.device) if table[step].next_from_noise else None
        x, x0 = denoising_step(model, table[step], x, x0, conditions, unconditional, guidance, noise)
    return x


def _noise(streams: Sequence[np.random.Generator], shape: tuple[int, int, int], device: torch.device) -> Tensor:
    noise = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
    return torch.from_numpy(noise).to(device)
