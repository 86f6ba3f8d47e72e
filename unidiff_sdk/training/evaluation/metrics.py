"""Metrics of retrieval, generation and collapse: pure NumPy, one function per metric, computed in float64.

The functions are independent of any model. Features come from the frozen judge (`evaluation.judge`) or from an encoder
under test. Similarities and relevance come from the evaluation. A wrong shape or a value that is not finite raises
OptionError, because a figure computed from it would look like a result.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from unidiff_sdk.errors import OptionError

__all__ = [
    "Interval",
    "cmmd",
    "effective_rank",
    "first_relevant_rank",
    "kid",
    "mean_pairwise_cosine",
    "median_rank",
    "nearest_neighbor_similarity",
    "paired_bootstrap",
    "per_prompt_diversity",
    "psnr",
    "recall_at_k",
]

Array = NDArray[np.float64]

CMMD_SIGMA = 10.0  # Jayasumana et al. 2024, section 4: fixed, so that figures compare across papers
CMMD_SCALE = 1000.0  # the same section, for readable figures


# --- retrieval -------------------------------------------------------------------------------------------------------


def first_relevant_rank(similarity: ArrayLike, relevant: ArrayLike) -> NDArray[np.int64]:
    """Rank of the best relevant item of each query, from 1.

    Ties count against the query: an irrelevant item with the score of the best relevant one ranks before it. A
    collapsed encoder, whose scores are all equal, therefore ranks last instead of first. Other relevant items never
    lower the rank.

    Args:
        similarity: float[n, m], query i against item j. Higher is more similar.
        relevant: bool[n, m].

    Returns:
        int64[n] in [1, m].

    Raises:
        OptionError: A query has no relevant item.
    """
    scores, truth = _scores_and_truth(similarity, relevant)
    best = np.where(truth, scores, -np.inf).max(axis=1, keepdims=True)
    return 1 + np.count_nonzero(~truth & (scores >= best), axis=1).astype(np.int64)


def recall_at_k(similarity: ArrayLike, relevant: ArrayLike, ks: Sequence[int] = (1, 5, 10)) -> dict[int, float]:
    """Share of queries with at least one relevant item among their first k: {k: share in [0, 1]}.

    The recall of image-text retrieval (Karpathy & Fei-Fei 2015, "Deep visual-semantic alignments", section 4.1).
    Shapes, ties and errors as in `first_relevant_rank`.
    """
    if any(k < 1 for k in ks):
        raise OptionError(f"ks is {list(ks)}, but every k must be at least 1.")
    ranks = first_relevant_rank(similarity, relevant)
    return {k: float(np.mean(ranks <= k)) for k in ks}


def median_rank(similarity: ArrayLike, relevant: ArrayLike) -> float:
    """Median of `first_relevant_rank` over the queries, in [1, m]. 1 is best."""
    return float(np.median(first_relevant_rank(similarity, relevant)))


# --- generation ------------------------------------------------------------------------------------------------------


def kid(features: ArrayLike, reference: ArrayLike) -> float:
    """Kernel Inception Distance: unbiased squared MMD with the kernel (x·y/d + 1)^3.

    Bińkowski, Sutherland, Arbel & Gretton 2018, "Demystifying MMD GANs", section 4, on the whole sets instead of
    averaged blocks (the same expectation, less variance). Unbiased: two samples of one distribution give about 0, above
    or below. Figures compare for one feature extractor only, so not with figures on Inception features.

    features: float[n, d]; reference: float[m, d]; n and m at least 2.
    """
    x, y = _two_samples(features, reference)

    def kernel(a: Array, b: Array) -> Array:
        return (a @ b.T / a.shape[1] + 1.0) ** 3

    return _unbiased_mmd2(kernel(x, x), kernel(y, y), kernel(x, y))


def cmmd(features: ArrayLike, reference: ArrayLike) -> float:
    """CMMD: squared MMD with the Gaussian kernel exp(-|x - y|²/200) on L2-normalized features, times 1000.

    Jayasumana et al. 2024, "Rethinking FID", with its bandwidth of 10. The estimator is the unbiased one of the paper.
    Its published code uses the biased one, which is close for 30,000 images but far above zero for the hundreds that
    are judged here.

    features: float[n, d]; reference: float[m, d]; n and m at least 2, no zero row. About 0 for equal distributions; at
    most 39.6, because unit vectors are at most 2 apart.
    """
    x, y = _two_samples(features, reference)
    x, y = _unit_rows(x), _unit_rows(y)

    def kernel(a: Array, b: Array) -> Array:
        squared_distance = 2.0 - 2.0 * (a @ b.T)  # of unit vectors
        return np.exp(-squared_distance / (2.0 * CMMD_SIGMA**2))

    return CMMD_SCALE * _unbiased_mmd2(kernel(x, x), kernel(y, y), kernel(x, y))


def psnr(image: ArrayLike, reference: ArrayLike, *, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, 10·log10(peak² / mean squared error), over all elements. inf if equal.

    peak: Largest possible value. Default: 255 for uint8, 1.0 for floating point.
    """
    a, b = np.asarray(image), np.asarray(reference)
    if a.shape != b.shape or a.dtype != b.dtype or a.size == 0:
        raise OptionError(
            f"psnr needs two images of one shape and dtype, not {a.shape} {a.dtype} and {b.shape} {b.dtype}."
        )
    if peak is None:
        if a.dtype != np.uint8 and not np.issubdtype(a.dtype, np.floating):
            raise OptionError(
                f"psnr has a default peak for uint8 (255) and floats (1.0) only. Give peak= for {a.dtype}."
            )
        peak = 255.0 if a.dtype == np.uint8 else 1.0
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    if not np.isfinite(error):
        raise OptionError("psnr needs finite images, but one of the two holds NaN or infinity.")
    return float("inf") if error == 0.0 else float(10.0 * np.log10(peak**2 / error))


# --- collapse and copying --------------------------------------------------------------------------------------------


def effective_rank(features: ArrayLike) -> float:
    """exp of the entropy of the singular values, normalized to sum 1: the number of directions that the features use.

    Roy & Vetterli 2007, "The effective rank". As published, the features are not centered.

    features: float[n, d], not all zero. Result in [1, min(n, d)]: 1 if all rows are parallel, min(n, d) if all singular
    values are equal.
    """
    x = _features(features, "features")
    singular = np.linalg.svd(x, compute_uv=False)
    if singular[0] == 0.0:
        raise OptionError("effective_rank is not defined for features that are all zero.")
    p = singular / singular.sum()
    p = p[p > 0.0]  # 0·log 0 = 0
    return float(np.exp(-np.sum(p * np.log(p))))


def mean_pairwise_cosine(features: ArrayLike) -> float:
    """Mean cosine over all pairs of different rows, in [-1/(n-1), 1]. 1 is full collapse; 0 is no common direction.

    The cone effect of Ethayarajh 2019, "How contextual are contextualized word representations?", section 3.2.

    features: float[n, d], n at least 2, no zero row.
    """
    x = _unit_rows(_features(features, "features", rows=2))
    n = len(x)
    total = x.sum(axis=0)
    # |Σu|² is the sum over all n² pairs, n of which are a row with itself at cosine 1. No n x n matrix is needed.
    return float((total @ total - n) / (n * (n - 1)))


def per_prompt_diversity(features: ArrayLike, prompts: Sequence[Hashable]) -> float:
    """Diversity of the images of one prompt: 1 - mean pairwise cosine within a prompt, averaged over prompts.

    The pairwise diversity of Ojha et al. 2021, "Few-shot image generation via cross-domain correspondence", section
    4.2, with cosine distance between features instead of LPIPS.

    Args:
        features: float[n, d], features of the images.
        prompts: n labels. Prompts with a single image are ignored.

    Returns:
        A value in [0, 2]. 0: every prompt always gives the same image.

    Raises:
        OptionError: No prompt has two images.
    """
    x = _features(features, "features")
    if len(prompts) != len(x):
        raise OptionError(
            f"per_prompt_diversity needs one prompt per row, not {len(prompts)} prompts for {len(x)} rows."
        )
    rows_of: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(row)
    distances = [1.0 - mean_pairwise_cosine(x[rows]) for rows in rows_of.values() if len(rows) > 1]
    if not distances:
        raise OptionError("per_prompt_diversity needs a prompt with at least two images. Generate more per prompt.")
    return float(np.mean(distances))


def nearest_neighbor_similarity(features: ArrayLike, gallery: ArrayLike) -> tuple[Array, NDArray[np.int64]]:
    """Cosine to the nearest gallery item of each row, and its index: (float64[n] in [-1, 1], int64[n]).

    Generated images compared with the training images show copying (Somepalli et al. 2023, "Diffusion art or digital
    forgery?", section 3). The reference is real held-out images compared with the same gallery. Of equally near items,
    the first is returned.

    features: float[n, d]; gallery: float[m, d]; no zero row.
    """
    x, y = _features(features, "features"), _features(gallery, "gallery")
    _same_width(x, y)
    cosine = np.clip(_unit_rows(x) @ _unit_rows(y).T, -1.0, 1.0)
    nearest = cosine.argmax(axis=1)
    return cosine[np.arange(len(x)), nearest], nearest.astype(np.int64)


# --- uncertainty -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """A difference of means with its bootstrap interval.

    Attributes:
        difference: The difference.
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Coverage of the interval, in (0, 1).
    """

    difference: float
    low: float
    high: float
    confidence: float


def paired_bootstrap(
    ours: ArrayLike, baseline: ArrayLike, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Percentile interval of mean(ours) - mean(baseline), both measured on the same prompts (and seeds).

    Paired bootstrap: Efron & Tibshirani 1993, chapter 13; Koehn 2004. With two axes, seeds and prompts are resampled
    independently (the pigeonhole bootstrap, Owen 2007), so that one lucky seed counts as one.

    Args:
        ours: float[prompts] or float[seeds, prompts], scores such as 1.0 for a hit.
        baseline: Scores of the same shape, in the same order.
        resamples: Number of resamples, at least 1.
        confidence: Coverage of the interval, in (0, 1).
        seed: The same seed gives the same interval.

    Raises:
        OptionError: A shape or value is not as stated, or a score is not finite.
    """
    a, b = np.asarray(ours, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if a.shape != b.shape or a.ndim not in (1, 2) or a.size == 0:
        raise OptionError(
            "paired_bootstrap needs two arrays float[prompts] or float[seeds, prompts] of one shape, "
            f"not {a.shape} and {b.shape}."
        )
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise OptionError(
            f"paired_bootstrap needs 0 < confidence < 1 and resamples >= 1, not {confidence} and {resamples}."
        )
    differences = np.atleast_2d(a - b)
    if not np.isfinite(differences).all():
        raise OptionError("paired_bootstrap needs finite scores. Leave prompts without a score out of both arrays.")

    random = np.random.default_rng(seed)
    # Sampling n of n with replacement gives multinomial counts. The resampled mean is then a product of weights.
    seed_weights, prompt_weights = (random.multinomial(n, np.full(n, 1 / n), resamples) / n for n in differences.shape)
    means = np.einsum("rs,sp,rp->r", seed_weights, differences, prompt_weights, optimize=True)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(differences.mean()), float(low), float(high), confidence)


# --- shared ----------------------------------------------------------------------------------------------------------


def _unbiased_mmd2(k_xx: Array, k_yy: Array, k_xy: Array) -> float:
    """Gretton et al. 2012, "A kernel two-sample test", equation 3: without the diagonals, a point with itself."""
    n, m = k_xy.shape
    within_x = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * k_xy.mean())


def _features(values: ArrayLike, name: str, rows: int = 1) -> Array:
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 2 or len(x) < rows or x.shape[1] < 1:
        raise OptionError(f"{name} has shape {x.shape}, but must be float[n, d] with n at least {rows}.")
    if not np.isfinite(x).all():
        raise OptionError(f"{name} must be finite, but {np.count_nonzero(~np.isfinite(x).all(axis=1))} rows are not.")
    return x


def _two_samples(features: ArrayLike, reference: ArrayLike) -> tuple[Array, Array]:
    x, y = _features(features, "features", rows=2), _features(reference, "reference", rows=2)
    _same_width(x, y)
    return x, y


def _same_width(x: Array, y: Array) -> None:
    if x.shape[1] != y.shape[1]:
        raise OptionError(
            f"Features of {x.shape[1]} and {y.shape[1]} dimensions do not compare: they come from different models."
        )


def _unit_rows(x: Array) -> Array:
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    if not norms.all():
        raise OptionError(
            f"The cosine of a zero vector is not defined. Zero rows: {np.flatnonzero(norms == 0.0)[:5].tolist()}"
        )
    return x / norms


def _scores_and_truth(similarity: ArrayLike, relevant: ArrayLike) -> tuple[Array, NDArray[np.bool_]]:
    scores, truth = _features(similarity, "similarity"), np.asarray(relevant)
    if truth.shape != scores.shape or truth.dtype != np.bool_:
        raise OptionError(f"relevant must be bool{list(scores.shape)} like similarity, not {truth.dtype}{truth.shape}.")
    without = np.flatnonzero(~truth.any(axis=1))
    if len(without):
        raise OptionError(
            f"{len(without)} queries have no relevant item, for example query {without[0]}. Leave them out."
        )
    return scores, truth
