"""The joint objective: ITC, IS and RSC, each a pure function of what its formula names.

Pairs (x_i, y_i). f is CLIP's image tower and g its text tower, both onto the unit sphere; u_i = f(x_i), v_i = g(y_i).
τ(y) are the text tower's token states, which condition the UNet ε_θ; E and D are the frozen VAE, z = E(x) its latents;
ᾱ_t is the noise schedule (`alpha_bar`). Every function returns a scalar that is finite for finite inputs, also when
nothing contributes to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "MAX_LOGIT_SCALE",
    "add_noise",
    "clamp_logit_scale",
    "diffusion_target",
    "generated_positives",
    "gradient_only_through_input",
    "itc",
    "leash",
    "min_snr_weight",
    "predict_original",
    "rsc_feature",
    "rsc_pixel",
    "same_meaning",
    "synthesis",
    "warm_up",
]

MAX_LOGIT_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5: logits scaled by more than 100 are unstable


# --- ITC: image-text contrast ----------------------------------------------------------------------------------------


def same_meaning(groups_a: Tensor, groups_b: Tensor) -> Tensor:
    """float[n, m], 1 where a_i and b_j bear the same group key: they mean the same, so they are positives."""
    return (groups_a[:, None] == groups_b[None, :]).float()


def itc(u: Tensor, v: Tensor, logit_scale: Tensor, positives: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE: ½·CE(s·u·vᵀ → P) + ½·CE(s·v·uᵀ → Pᵀ), P the positives of each row shared equally.

    Radford et al. 2021 (CLIP), figure 3; with several positives a row, Khosla et al. 2020 (SupCon), equation 2.

    u, v: float[n, d], unit rows, pair i in row i. logit_scale: log s, scalar. positives: float[n, n] of 0 and 1, at
    least one a row and a column; default: the diagonal.
    """
    logits = logit_scale.exp() * u @ v.T
    positives = torch.eye(len(u), device=u.device) if positives is None else positives
    return (_soft_cross_entropy(logits, positives) + _soft_cross_entropy(logits.T, positives.T)).mean() / 2


def _soft_cross_entropy(logits: Tensor, positives: Tensor) -> Tensor:
    """float[n]: cross-entropy of each row against the uniform distribution over its positives."""
    target = positives / positives.sum(dim=1, keepdim=True)
    return -(target * logits.log_softmax(dim=1)).sum(dim=1)


@torch.no_grad()
def clamp_logit_scale(logit_scale: nn.Parameter) -> None:
    """Keep the learned temperature within CLIP's bounds, 1 ≤ s ≤ 100; to be called after each optimizer step."""
    logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)


def leash(u: Tensor, u_base: Tensor) -> Tensor:
    """1 - cos(u_i, u⁰_i), averaged: how far embeddings have gone from the base's. u, u_base: float[n, d], unit rows."""
    return (1 - (u * u_base).sum(dim=1)).mean()


# --- IS: image synthesis ---------------------------------------------------------------------------------------------


def add_noise(z: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """z_t = √ᾱ_t·z + √(1-ᾱ_t)·ε (Ho et al. 2020, equation 4). z, noise: float[n, c, h, w]; alpha_bar: float[n]."""
    signal, sigma = _signal_and_sigma(alpha_bar)
    return signal * z + sigma * noise


def diffusion_target(z: Tensor, noise: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """What the UNet is to answer: ε, or v = √ᾱ_t·ε - √(1-ᾱ_t)·z (Salimans & Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    signal, sigma = _signal_and_sigma(alpha_bar)
    return signal * noise - sigma * z


def predict_original(z_t: Tensor, output: Tensor, alpha_bar: Tensor, prediction_type: str) -> Tensor:
    """The denoising estimate ẑ_0: (z_t - √(1-ᾱ_t)·ε)/√ᾱ_t, or √ᾱ_t·z_t - √(1-ᾱ_t)·v."""
    signal, sigma = _signal_and_sigma(alpha_bar)
    if prediction_type == "epsilon":
        return (z_t - sigma * output) / signal
    return signal * z_t - sigma * output


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Min-SNR-γ: min(SNR, γ)/SNR for ε, min(SNR, γ)/(SNR + 1) for v, SNR = ᾱ_t/(1-ᾱ_t); γ = 0 weighs all alike.

    Hang et al. 2023, "Efficient diffusion training via min-SNR weighting strategy", section 3.4. alpha_bar: float[n].
    """
    if gamma == 0:
        return torch.ones_like(alpha_bar)
    if prediction_type == "epsilon":
        # γ/SNR instead of min(SNR, γ)/SNR: finite also at zero terminal SNR.
        return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)
    # min(SNR, γ)/(SNR + 1), both sides times 1-ᾱ_t
    return torch.minimum(alpha_bar, gamma * (1 - alpha_bar))


def synthesis(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """E w(t)·‖target - output‖², the square averaged over a sample's elements. weight: float[n]."""
    return (weight * (output - target).square().flatten(1).mean(dim=1)).mean()


def _signal_and_sigma(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    alpha_bar = alpha_bar[:, None, None, None]
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


# --- RSC: reciprocal semantic consistency ----------------------------------------------------------------------------


def warm_up(step: int, steps: int) -> float:
    """From 0 to 1, linearly over the first `steps` steps: early denoising estimates mean nothing yet."""
    return min(1.0, step / steps) if steps else 1.0


def rsc_pixel(u_hat: Tensor, u: Tensor, alpha_bar: Tensor) -> Tensor:
    """The generator learns from the encoder: Σ ᾱ_t·(1 - cos(û_i, f̄(x_i))) / n over the n samples that passed the gate.

    What a picture means must survive its denoising estimate; the noisier the estimate, the less it counts. With f̄
    under stopped gradients (`gradient_only_through_input`), it teaches the UNet, and the text tower through τ.

    u_hat: float[n, d], û_i = f̄(D(ẑ_0)); u: float[n, d], f̄(x_i); unit rows; alpha_bar: float[n]. n = 0 gives zero.
    """
    distance = 1 - (u_hat * u.detach()).sum(dim=1)
    return (alpha_bar * distance).sum() / max(len(u_hat), 1)


def generated_positives(u_hat: Tensor, v: Tensor, logit_scale: Tensor, positives: Tensor, alpha_bar: Tensor) -> Tensor:
    """The encoder learns from the generator: the detached estimate x̂_0 is one more picture of its caption y.

    The image-to-text half of ITC, ᾱ_t-weighted, over the n samples that passed the gate, against the batch's texts.

    u_hat: float[n, d], f(x̂_0) with x̂_0 detached by the caller; v: float[m, d]; positives: float[n, m], `same_meaning`
    of the estimates' and the texts' groups; alpha_bar: float[n]. n = 0 gives zero.
    """
    cross_entropy = _soft_cross_entropy(logit_scale.exp() * u_hat @ v.T, positives)
    return (alpha_bar * cross_entropy).sum() / max(len(u_hat), 1)


def rsc_feature(h: Tensor, u: Tensor, temperature: float = 0.1) -> Tensor:
    """Without decoding: the UNet's features and CLIP's must find the same pictures of a batch alike.

    ½·KL(P̄_u ‖ P_h) + ½·KL(P̄_h ‖ P_u), P the softmax over a picture's cosines to the others, the bar a stop.
    Features are centered over the batch first: pooled activations share one large mean that would hide what differs.

    h: float[n, c], pooled mid-block features; u: float[n, d]. Fewer than three pictures have no structure: zero.
    """
    if len(h) < 3:
        return 0.0 * (h.sum() + u.sum())
    log_p_h, log_p_u = _neighbors(h, temperature), _neighbors(u, temperature)
    kl = F.kl_div(log_p_h, log_p_u.detach(), log_target=True, reduction="none")
    reverse = F.kl_div(log_p_u, log_p_h.detach(), log_target=True, reduction="none")
    return (kl + reverse).sum(dim=1).mean() / 2


def _neighbors(features: Tensor, temperature: float) -> Tensor:
    """log float[n, n-1]: how likely picture i takes each other picture for its like."""
    unit = F.normalize(features - features.mean(dim=0), dim=1)
    n = len(unit)
    others = ~torch.eye(n, dtype=torch.bool, device=unit.device)
    return ((unit @ unit.T)[others].view(n, n - 1) / temperature).log_softmax(dim=1)


def gradient_only_through_input(tower: nn.Module, weights: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """f̄(pixels): `tower` with `weights` as constants, so that the gradient passes to its input and to nothing else.

    weights: the tower's own (`dict(tower.named_parameters())`) for the tuned encoder, or its EMA.
    """
    constants = {name: weight.detach() for name, weight in weights.items()}
    answer: Tensor = torch.func.functional_call(tower, constants, (pixels,))
    return answer
