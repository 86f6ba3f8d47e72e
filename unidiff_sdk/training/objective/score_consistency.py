"""RSC by score consistency: encoder and generator must agree on which image belongs to a caption.

The encoder scores an image x_j for a caption y_i by the cosine s_ij = v_i·u_j. The generator scores it by how much the
caption helps to denoise the image:

    g_ij = (e(x_j, ∅) - e(x_j, y_i)) / e(x_j, ∅),    e(x, c) = E ‖target - ε_θ(z_t, t, c)‖²

The expectation is over a few timesteps of high noise, where the caption decides most. All candidates of a caption have
the same noise. Sources of the score: Krojer et al. 2023, "Are diffusion models vision-and-language reasoners?", and
Li et al. 2023, "Your diffusion model is secretly a zero-shot classifier". The scores are compared for each caption over
its own image and the images of other meaning that the encoder ranks highest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from unidiff_sdk.training.config import TrainingConfig

from . import losses
from .batch import Conditions
from .joint_model import JointModel

__all__ = ["GENERATOR_TEMPERATURE", "Ranking", "ScoreInputs", "choose_candidates", "encoder_logits", "generator_logits"]

# The temperature of g with the highest likelihood of the right image: the built-in model, 60 captions with 6 candidates
# each, one timestep, on unseen products (cross-entropy 0.30; 0.36 at 0.03, 0.37 at 0.1).
GENERATOR_TEMPERATURE = 0.05
# The noisy part of the schedule. With less noise, the noisy image itself decides, whatever the caption says.
LOWEST, HIGHEST = 0.65, 0.95


@dataclass(frozen=True)
class Ranking:
    """The generator's ranking of images for the step's first captions.

    Attributes:
        candidates: int64[a, c], positions in the step's batch; the caption's own image first.
        logits: float[a, c], see `generator_logits`. Constants.
    """

    candidates: Tensor
    logits: Tensor


@dataclass(frozen=True)
class ScoreInputs:
    """Random numbers for the a captions that a step scores. On the CPU.

    Attributes:
        t: int64[a, r], noise levels, as in `RandomInputs`.
        noise: float[a, r, c, h, w], standard normal.
    """

    t: Tensor
    noise: Tensor

    @classmethod
    def sample(
        cls,
        generator: torch.Generator,
        captions: int,
        shape: tuple[int, ...],
        timesteps: Tensor,
        config: TrainingConfig,
    ) -> ScoreInputs:
        """Sample the numbers of a step. shape: (c, h, w) of the latents. timesteps: see `JointModel.timesteps`."""
        size, total = (captions, config.rsc_timesteps), len(timesteps)
        bounds = timesteps.new_tensor([int(LOWEST * total), int(HIGHEST * total)])
        low, high = torch.searchsorted(timesteps, bounds).tolist()
        t = torch.randint(low, max(low + 1, high), size, generator=generator)
        return cls(t, torch.randn((*size, *shape), generator=generator))

    def select(self, indices: Tensor) -> ScoreInputs:
        """The numbers of some captions. indices: int64[k]."""
        return ScoreInputs(self.t[indices], self.noise[indices])


@torch.no_grad()
def choose_candidates(u: Tensor, v: Tensor, groups: Tensor, config: TrainingConfig, samples: int) -> Tensor:
    """Choose the candidates of the step's first captions: the own image, then the nearest images of other meaning.

    Args:
        u, v: float[m, d], image and text embeddings of the step, unit rows.
        groups: int64[m], see `Batch`.
        samples: n ≤ m, the pairs of the step that pass through the UNet. Candidates come from these.

    Returns:
        int64[a, c], positions in the step's batch. c is at most `config.rsc_candidates`, and smaller if a caption has
        fewer images of other meaning in the batch.
    """
    captions = min(config.rsc_captions, samples)
    same = groups[:captions, None] == groups[None, :samples]
    others = min(config.rsc_candidates - 1, int((~same).sum(dim=1).min()))
    nearest = (v[:captions] @ u[:samples].T).masked_fill(same, -torch.inf).topk(others, dim=1).indices
    return torch.cat([torch.arange(captions, device=nearest.device)[:, None], nearest], dim=1)


def encoder_logits(u: Tensor, v: Tensor, candidates: Tensor, logit_scale: Tensor) -> Tensor:
    """s_ij of each caption's candidates, divided by CLIP's temperature, which is a constant here: float[a, c]."""
    scores = torch.einsum("ad,acd->ac", v[: len(candidates)], u[candidates])
    return logit_scale.detach().exp() * scores


def generator_logits(
    model: JointModel,
    latents: Tensor,
    input_ids: Tensor,
    empty_ids: Tensor,
    inputs: ScoreInputs,
    sizes: Tensor | None = None,
) -> Tensor:
    """g_ij of each caption's candidates, divided by its temperature: float[a, c].

    Gradients reach the UNet and its text encoder through e(x, y). e(x, ∅) is a constant: otherwise the score would also
    rise when the model denoises worse without a caption.

    Args:
        latents: float[a, c, channels, h, w], scaled latents of the candidates.
        input_ids: int64[a, tokens], the captions.
        empty_ids: int64[1, tokens], the tokens of "".
        inputs: Timesteps and noise of each caption.
        sizes: float[a, c, 6], sizes of the candidates, see `Conditions`.
    """
    a, c = latents.shape[:2]
    t, noise = inputs.t.to(latents.device), inputs.noise.to(latents.device)
    shape = (a, c, t.shape[1])  # one row of the UNet each
    z = latents[:, :, None].expand(*shape, *latents.shape[2:]).flatten(0, 2)
    noise = noise[:, None].expand(*shape, *noise.shape[2:]).flatten(0, 2)
    t = t[:, None].expand(shape).flatten()
    alpha_bar = model.alpha_bar[t]
    z_t = losses.add_noise(z, noise, alpha_bar, model.prediction_type)
    target = losses.diffusion_target(z, noise, alpha_bar, model.prediction_type)

    of_rows = None if sizes is None else sizes[:, :, None].expand(*shape, 6).flatten(0, 2)

    def error(encode: Callable[[Tensor], Conditions], ids: Tensor) -> Tensor:
        with model.autocast():
            conditions = encode(ids).repeated(len(t) // len(ids)).with_sizes(of_rows)
            output = model.predict(z_t, model.timesteps[t], conditions)
        return (output.float() - target).square().flatten(1).mean(dim=1).view(shape).mean(dim=2)

    with torch.no_grad():
        without = error(model.unconditional, empty_ids)
    return losses.relative_gain(error(model.encode_prompts, input_ids), without) / GENERATOR_TEMPERATURE
