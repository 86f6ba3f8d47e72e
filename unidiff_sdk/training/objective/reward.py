"""RSC by reward: the generator learns from the encoder's judgment of images that it generates during training.

For some captions of a step, the sampler generates latents from noise. Its last steps have gradients, which reach the
UNet through the VAE's decoder and the image tower, both of them constants. The reward is the log probability that the
encoder gives the right caption among all captions of the step:

    L_reward = -E log Σ_{j ∈ P_i} exp(s·⟨f̄(a(x̂_i)), v_j⟩) / Σ_j exp(s·⟨f̄(a(x̂_i)), v_j⟩)

P_i are the captions with the meaning of y_i, s is CLIP's temperature, and a is a random crop: a pattern of pixels that
deceives the encoder at one position only is worth less.

Sources: Xu et al. 2023, "ImageReward" (reward feedback at a late step), and Clark et al. 2023, "Directly fine-tuning
diffusion models on differentiable rewards" (DRaFT-K: gradients through the last K steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unidiff_sdk.generation.samplers import Coefficients, Table, advance, make_table
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.training.config import TrainingConfig

from . import losses
from .distillation import apply_guidance
from .joint_model import JointModel

__all__ = ["RewardInputs", "crop", "reward_loss", "rollout"]

SAMPLER = "dpm++2m"  # the best of the deterministic samplers at few steps
CROPS = 2  # of each generated image
SMALLEST_CROP = 0.8  # of the side of the image


@dataclass(frozen=True)
class RewardInputs:
    """Random numbers for the a captions that a step generates images for. On the CPU.

    Attributes:
        noise: float[a, c, h, w], standard normal.
        crops: float[a, CROPS, 3]: size, horizontal and vertical position of each crop, uniform in [0, 1).
    """

    noise: Tensor
    crops: Tensor

    @classmethod
    def sample(cls, generator: torch.Generator, captions: int, shape: tuple[int, ...]) -> RewardInputs:
        """Sample the numbers of a step. shape: (c, h, w) of the latents."""
        noise = torch.randn((captions, *shape), generator=generator)
        return cls(noise, torch.rand((captions, CROPS, 3), generator=generator))

    def select(self, indices: Tensor) -> RewardInputs:
        """The numbers of some captions. indices: int64[k]."""
        return RewardInputs(self.noise[indices], self.crops[indices])


def reward_loss(
    model: JointModel,
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
        input_ids: int64[a, tokens], the captions.
        empty_ids: int64[1, tokens], the tokens of "".
        v: float[m, d], embeddings of all captions of the step, unit rows.
        positives: float[a, m] of 0 and 1: the captions with the same meaning.
        inputs: Noise and crops of each caption.
    """
    latents = rollout(model, input_ids, empty_ids, inputs.noise, config)
    with model.autocast():
        pixels = model.to_clip(model.decode(latents))
        views = crop(pixels, inputs.crops.to(pixels.device))
        with model.f.as_teacher():
            u_hat = losses.gradient_only_through_input(model.f, model.image_tower_weights({}), views)
    repeated = positives.repeat_interleave(inputs.crops.shape[1], dim=0)
    return losses.caption_likelihood(u_hat, v.detach(), model.clip.logit_scale.detach(), repeated)


def rollout(model: JointModel, input_ids: Tensor, empty_ids: Tensor, noise: Tensor, config: TrainingConfig) -> Tensor:
    """Generate latents with guidance, the last `reward_last_steps` with gradients: float[a, c, h, w].

    The prediction without a caption is a constant. Otherwise the reward would also rise when the model denoises worse
    without one.
    """
    table = _table(model, config.reward_steps)
    with torch.no_grad(), model.autocast():
        states, empty = (model.text_encoder(ids).last_hidden_state for ids in (input_ids, empty_ids))
    x: Any = noise.to(model.device) * table.init_noise_sigma
    x0: Any = None
    for step in range(len(table)):
        coefficients = Coefficients(*map(float, table[step]))
        t = torch.full((len(x),), coefficients.timestep, device=x.device)
        scaled = x * coefficients.input_scale
        is_differentiated = step >= len(table) - config.reward_last_steps
        with model.autocast(), torch.set_grad_enabled(is_differentiated and torch.is_grad_enabled()):
            output = model.unet(scaled, t, states).sample.float()
            if config.reward_guidance > 1:
                with torch.no_grad():
                    unconditional = model.unet(scaled, t, empty.expand_as(states)).sample.float()
                output = apply_guidance(unconditional, output, config.reward_guidance)
            x, x0 = advance(
                coefficients, x, output, x0, None
            )  # the arithmetic of NumPy and of PyTorch is the same here
    return x


def crop(images: Tensor, numbers: Tensor) -> Tensor:
    """Random square crops, resized to the size of the image. Differentiable.

    Args:
        images: float[n, channels, s, s].
        numbers: float[n, k, 3] in [0, 1]: size (0: `SMALLEST_CROP`, 1: the whole image) and position of each crop.

    Returns:
        float[n·k, channels, s, s], the crops of an image next to each other.
    """
    n, k, _ = numbers.shape
    size = SMALLEST_CROP + (1 - SMALLEST_CROP) * numbers[..., 0]
    shift = (1 - size)[..., None] * (2 * numbers[..., 1:] - 1)
    theta = images.new_zeros(n, k, 2, 3, dtype=torch.float32)
    theta[..., 0, 0] = theta[..., 1, 1] = size
    theta[..., 2] = shift
    repeated = images.float().repeat_interleave(k, dim=0)
    grid = F.affine_grid(theta.flatten(0, 1), list(repeated.shape), align_corners=False)
    return F.grid_sample(repeated, grid, padding_mode="border", align_corners=False)


def _table(model: JointModel, steps: int) -> Table:
    alpha_bar = model.alpha_bar.double().cpu().numpy()
    return make_table(SAMPLER, Schedule(alpha_bar, model.prediction_type), steps)
