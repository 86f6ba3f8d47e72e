"""The losses of the joint objective: ITC, IS and RSC, each a pure function of the symbols in its formula.

Pairs (x_i, y_i) of an image and a caption. f is CLIP's image tower and g its text tower, both onto the unit sphere:
u_i = f(x_i), v_i = g(y_i). τ(y) are the token states of the text tower, which condition the UNet ε_θ. E and D are the
encoder and decoder of the frozen VAE; z = E(x) are latents. ᾱ_t is the noise schedule (`alpha_bar`). Every loss is a
scalar. It is finite for finite inputs, even if no sample contributes to it.

Models that predict ε or v have noisy latents z_t = √ᾱ_t·z + √(1-ᾱ_t)·ε. Flow matching ("flow", Stable Diffusion 3) has
z_t = ᾱ_t·z + (1-ᾱ_t)·ε: its noise level σ_t is 1-ᾱ_t.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MAX_LOGIT_SCALE",
    "add_noise",
    "clamp_logit_scale",
    "diffusion_target",
    "feature_distillation",
    "gradient_only_through_input",
    "itc",
    "linear_warmup",
    "min_snr_weight",
    "relative_gain",
    "same_meaning",
    "score_consistency",
    "sigmoid_itc",
    "synthesis",
]

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5: training is unstable with larger scales


# --- ITC: image-text contrast ----------------------------------------------------------------------------------------


def same_meaning(groups_a: Tensor, groups_b: Tensor) -> Tensor:
    """Positives of each other: 1 where a_i and b_j have the same group, else 0.

    groups_a: int64[n]; groups_b: int64[m]. Returns float[n, m].
    """
    return (groups_a[:, None] == groups_b[None, :]).float()


def itc(u: Tensor, v: Tensor, logit_scale: Tensor, positives: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: ½·CE(s·u·vᵀ → P) + ½·CE(s·v·uᵀ → Pᵀ). P is uniform over the positives of each row.

    Radford et al. 2021 (CLIP), figure 3. With several positives per row: Khosla et al. 2020 (SupCon), equation 2.

    Args:
        u: float[n, d], image embeddings, unit rows.
        v: float[n, d], text embeddings, unit rows. Pair i is in row i of both.
        logit_scale: log s, a scalar.
        positives: float[n, n] of 0 and 1, with at least one 1 in each row and column. Default: the diagonal.
    """
    logits = logit_scale.exp() * u @ v.T
    positives = torch.eye(len(u), device=u.device) if positives is None else positives
    return (_soft_cross_entropy(logits, positives) + _soft_cross_entropy(logits.T, positives.T)).mean() / 2


def _soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """Cross-entropy of each row against the uniform distribution over its positives: float[n]."""
    target = positives / positives.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1)


def sigmoid_itc(
    u: Tensor, v: Tensor, logit_scale: Tensor, logit_bias: Tensor, positives: Tensor | None = None
) -> Tensor:
    """Pairwise sigmoid loss: -1/n · Σ_ij log σ(z_ij·(s·u_i·v_j + b)), with z_ij = 1 for positives and -1 for others.

    Zhai et al. 2023, "Sigmoid loss for language image pre-training", algorithm 1. Every pair is a binary decision, so
    several positives in a row need no normalization.

    Args:
        u: float[n, d], image embeddings, unit rows.
        v: float[n, d], text embeddings, unit rows. Pair i is in row i of both.
        logit_scale: log s, a scalar.
        logit_bias: b, a scalar.
        positives: float[n, n] of 0 and 1. Default: the diagonal.
    """
    logits = logit_scale.exp() * u @ v.T + logit_bias
    positives = torch.eye(len(u), device=u.device) if positives is None else positives
    return -F.logsigmoid((2 * positives - 1) * logits).sum() / len(u)


@torch.no_grad()
def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Clamp the learned temperature to CLIP's bounds, 1 ≤ s ≤ 100. Call it after each optimizer step."""
    logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def feature_distillation(u: Tensor, u_base: Tensor) -> Tensor:
    """Mean of 1 - cos(u_i, u⁰_i): the distance of embeddings from those of the base, in [0, 2].

    Feature distillation from the frozen base, as in Li & Hoiem 2016, "Learning without forgetting", for features.

    u, u_base: float[n, d], unit rows.
    """
    return (1 - (u * u_base).sum(dim=1)).mean()


# --- IS: image synthesis ---------------------------------------------------------------------------------------------


def add_noise(z: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Noisy latents z_t = √ᾱ_t·z + √(1-ᾱ_t)·ε (Ho et al. 2020, equation 4).

    For flow matching ᾱ_t·z + (1-ᾱ_t)·ε (Esser et al. 2024, section 3).

    z, noise: float[n, c, h, w]; alpha_bar: float[n]; prediction_type: "epsilon", "v_prediction" or "flow". Returns
    float[n, c, h, w].
    """
    signal, sigma = _signal_and_sigma(alpha_bar, prediction_type)
    return signal * z + sigma * noise


def diffusion_target(z: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """Target of the UNet: ε, or v = √ᾱ_t·ε - √(1-ᾱ_t)·z (Salimans & Ho 2022, appendix D), or for flow matching ε - z.

    z, noise: float[n, c, h, w]; alpha_bar: float[n]; prediction_type: "epsilon", "v_prediction" or "flow".
    """
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "flow":
        return noise - z
    signal, sigma = _signal_and_sigma(alpha_bar, prediction_type)
    return signal * noise - sigma * z


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ weight: min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, with SNR = ᾱ_t/(1-ᾱ_t).

    Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4. Flow matching has the
    weight 1: how often each timestep is sampled weights its loss (Esser et al. 2024, section 3.1).

    alpha_bar: float[n]; gamma: γ ≥ 0, where 0 gives every timestep the weight 1. Returns float[n].
    """
    if gamma == 0 or prediction_type == "flow":
        return torch.ones_like(alpha_bar)
    if prediction_type == "epsilon":
        # min(γ/SNR, 1) equals min(SNR, γ)/SNR and stays finite at zero terminal SNR.
        return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)
    # min(SNR, γ)/(SNR + 1), numerator and denominator multiplied by 1-ᾱ_t
    return torch.minimum(alpha_bar, gamma * (1 - alpha_bar))


def synthesis(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Denoising loss E w(t)·‖target - output‖². The square is averaged over the elements of a sample.

    output, target: float[n, c, h, w]; weight: float[n].
    """
    return (weight * (output - target).square().flatten(1).mean(dim=1)).mean()


def _signal_and_sigma(alpha_bar: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    """Shares of z and ε in z_t: their squares add up to 1, for flow matching they themselves do."""
    alpha_bar = alpha_bar[:, None, None, None]
    if prediction_type == "flow":
        return alpha_bar, 1 - alpha_bar
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


# --- RSC: reciprocal semantic consistency ----------------------------------------------------------------------------


def linear_warmup(step: int, steps: int) -> float:
    """Factor from 0 to 1, linear over the first `steps` steps. An untuned half does not know the catalog yet."""
    return min(1.0, step / steps) if steps else 1.0


def relative_gain(error: Tensor, error_without: Tensor) -> Tensor:
    """The generator's score of an image for a caption, (e(x, ∅) - e(x, y)) / e(x, ∅): at most 1, 0 if it does not help.

    error, error_without: Denoising errors with and without the caption, of equal shape. Without the division, images
    that are hard to denoise would dominate.
    """
    return (error_without - error) / error_without


def score_consistency(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean of KL(softmax(teacher_i) ‖ softmax(student_i)) over captions i. The teacher is a constant.

    Distillation of scores: Hinton et al. 2015, "Distilling the knowledge in a neural network", with logits that are
    scores of candidates.

    student, teacher: float[a, c], logits of the c candidates of each caption. a = 0 or c < 2 gives 0.
    """
    if student.shape[0] == 0:
        return 0.0 * student.sum()
    target = teacher.detach().log_softmax(dim=1)
    return F.kl_div(student.log_softmax(dim=1), target, log_target=True, reduction="batchmean")


def caption_likelihood(u_hat: Tensor, v: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
    """Mean of -log Σ_{j ∈ P_i} p_ij, where p_i is the softmax of an image's scores s·⟨û_i, v_j⟩ of m captions.

    Args:
        u_hat: float[n, d], embeddings of generated images, unit rows.
        v: float[m, d], text embeddings, unit rows.
        logit_scale: log s, a scalar.
        positives: float[n, m] of 0 and 1: P_i, the right captions of each image, at least one.
    """
    logits = logit_scale.exp() * u_hat @ v.T
    right = logits.masked_fill(positives == 0, -torch.inf)
    return (logits.logsumexp(dim=1) - right.logsumexp(dim=1)).mean()


def gradient_only_through_input(tower: nn.Module, pixels: Tensor) -> Tensor:
    """f̄(pixels): run `tower` with its weights as constants, so that gradients reach only its input."""
    # Not by `functional_call`: a sharded block exchanges the weights that it is given for its own.
    trained = [parameter for parameter in tower.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        output: Tensor = tower(pixels)
    finally:
        for parameter in trained:
            parameter.requires_grad = True
    return output
