"""RSC by reward: the generator learns from the encoder's judgment of images that it generates during training.

For some captions of a step, the base's sampler generates latents from noise. Its last steps have gradients, which reach
the UNet through the VAE's decoder and the image tower, both of them constants. The reward is the log probability that
the encoder gives the right caption among all captions of the step:

    L_reward = -E log Σ_{j ∈ P_i} exp(s·⟨f̄(a(x̂_i)), v_j⟩) / Σ_j exp(s·⟨f̄(a(x̂_i)), v_j⟩)

P_i are the captions with the meaning of y_i, s is CLIP's temperature, and a is a random view: a pattern of pixels that
deceives the encoder at one position only is worth less.

Sources: Xu et al. 2023, "ImageReward" (reward feedback at a late step), Clark et al. 2023, "Directly fine-tuning
diffusion models on differentiable rewards" (DRaFT-K: gradients through the last K steps), and Prabhudesai et al. 2023,
"Aligning text-to-image diffusion models with reward backpropagation" (AlignProp).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff_sdk.generation.samplers import Table, make_table
from unidiff_sdk.training.config import TrainingConfig

from . import losses
from .joint_model import JointModel
from .sampling import denoising_step

__all__ = ["VIEWS", "RewardInputs", "augment", "reward_loss", "reward_table", "rollout"]

VIEWS = 2  # of each generated image
SMALLEST_VIEW = 0.8  # of the side of the image
MARGIN = 0.05  # by which a view may reach beyond an edge, as a fraction of the side of the image


def reward_table(model: JointModel, config: TrainingConfig) -> Table:
    """Table of the base's own sampler for the steps of the generated images.

    Raises OptionError if the sampler does not support this number of steps.
    """
    return make_table(model.sampler_defaults["name"], model.schedule, config.rsc_reward_steps)


@dataclass(frozen=True)
class RewardInputs:
    """Random numbers for the a captions that a step generates images for. On the CPU.

    Attributes:
        noise: float[a, 1 + s, c, h, w], standard normal: the start of an image, and the noise that its s steps add.
            s is 0 for a sampler that adds none.
        views: float[a, VIEWS, 4], uniform in [0, 1), see `augment`.
    """

    noise: Tensor
    views: Tensor

    @classmethod
    def sample(cls, generator: torch.Generator, captions: int, shape: tuple[int, ...], table: Table) -> RewardInputs:
        """Sample the numbers of a step. shape: (c, h, w) of the latents."""
        steps = len(table) if table.needs_noise else 0
        noise = torch.randn((captions, 1 + steps, *shape), generator=generator)
        return cls(noise, torch.rand((captions, VIEWS, 4), generator=generator))

    def select(self, indices: Tensor) -> RewardInputs:
        """The numbers of some captions. indices: int64[k]."""
        return RewardInputs(self.noise[indices], self.views[indices])


def reward_loss(
    model: JointModel,
    table: Table,
    input_ids: Tensor,
    empty_ids: Tensor,
    v: Tensor,
    positives: Tensor,
    inputs: RewardInputs,
    config: TrainingConfig,
) -> Tensor:
    """Mean of L_reward over a captions. Gradients reach only the UNet.

    The text side is a constant: it also embeds the captions that the reward compares, and must not adapt to the images.

    Args:
        table: See `reward_table`.
        input_ids: int64[a, tokens], the captions.
        empty_ids: int64[1, tokens], the tokens of "".
        v: float[m, d], embeddings of all captions of the step, unit rows.
        positives: float[a, m] of 0 and 1: the captions with the same meaning.
        inputs: Noise and views of each caption.
    """
    latents = rollout(model, table, input_ids, empty_ids, inputs.noise, config)
    with model.autocast():
        pixels = model.decode(latents).clamp(0, 1)  # as images are saved
    views = model.to_clip(augment(pixels, inputs.views, flip=config.flip))
    with model.autocast(), model.f.as_teacher():
        u_hat = losses.gradient_only_through_input(model.f, views)
    repeated = positives.repeat_interleave(inputs.views.shape[1], dim=0)
    return losses.caption_likelihood(u_hat, v.detach(), model.clip.logit_scale.detach(), repeated)


def rollout(
    model: JointModel, table: Table, input_ids: Tensor, empty_ids: Tensor, noise: Tensor, config: TrainingConfig
) -> Tensor:
    """Generate latents with guidance, the last `rsc_reward_last` steps with gradients: float[a, c, h, w]."""
    guidance_scale: float = config.rsc_reward_guidance or model.sampler_defaults["guidance_scale"]
    with torch.no_grad(), model.autocast():
        conditions, unconditional = model.encode_prompts(input_ids), model.unconditional(empty_ids)
    noise = noise.to(model.device)
    x, x0 = noise[:, 0] * table.init_noise_sigma, None
    for step in range(len(table)):
        added = noise[:, 1 + step] if table.needs_noise else None
        is_differentiated = step >= len(table) - config.rsc_reward_last
        # One context each: autocast would reuse the weights that it has cast without gradients.
        with torch.set_grad_enabled(is_differentiated and torch.is_grad_enabled()), model.autocast():
            x, x0 = denoising_step(model, table[step], x, x0, conditions, unconditional, guidance_scale, added)
    return x


def augment(images: Tensor, numbers: Tensor, *, flip: bool) -> Tensor:
    """Random square views: cropped, shifted and mirrored. Differentiable.

    A view may reach beyond an edge, where the pixels at the edge are repeated.

    Args:
        images: float[n, channels, s, s].
        numbers: float[n, k, 4] in [0, 1]: size of each view (0: `SMALLEST_VIEW`, 1: that of the image), horizontal and
            vertical position, and whether it is mirrored (from 0.5).
        flip: Mirror half of the views.

    Returns:
        float[n·k, channels, s, s], the views of an image next to each other.
    """
    size, horizontal, vertical, mirror = numbers.to(images).flatten(0, 1).unbind(dim=1)
    side = SMALLEST_VIEW + (1 - SMALLEST_VIEW) * size
    reach = 1 - side + 2 * MARGIN  # in the coordinates of the grid, an image is 2 wide
    direction = torch.where((mirror >= 0.5) & flip, -1.0, 1.0).to(images)
    none = torch.zeros_like(side)
    x = torch.stack([direction * side, none, reach * (2 * horizontal - 1)], dim=1)
    y = torch.stack([none, side, reach * (2 * vertical - 1)], dim=1)
    repeated = images.repeat_interleave(numbers.shape[1], dim=0)
    grid = F.affine_grid(torch.stack([x, y], dim=1), list(repeated.shape), align_corners=False)
    return F.grid_sample(repeated, grid, padding_mode="border", align_corners=False)
