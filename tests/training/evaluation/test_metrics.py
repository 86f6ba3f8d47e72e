"""Each metric compared with an independent computation: brute force or a closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.evaluation import metrics

seeds = st.integers(0, 2**32 - 1)
brief = settings(max_examples=25, deadline=None)  # no deadline: a busy machine is not a failure


def sample(seed: int, n: int, d: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (n, d))


def retrieval(seed: int, n: int = 12, m: int = 15, levels: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Few levels of similarity, so that ties are common, and at least one relevant item per query."""
    random = np.random.default_rng(seed)
    relevant = random.random((n, m)) < 0.15
    relevant[np.arange(n), random.integers(0, m, n)] = True
    return random.integers(0, levels, (n, m)).astype(np.float32), relevant


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    dot, aa, bb = (math.fsum(p * q for p, q in zip(u, v, strict=True)) for u, v in ((a, b), (a, a), (b, b)))
    return 1.0 - dot / math.sqrt(aa * bb)


def mean_cosine_distance(x: np.ndarray) -> float:
    """Over all pairs of different rows, one by one."""
    pairs = list(itertools.combinations(x, 2))
    return math.fsum(cosine_distance(a, b) for a, b in pairs) / len(pairs)


# --- retrieval -------------------------------------------------------------------------------------------------------


def brute_force_ranks(similarity: np.ndarray, relevant: np.ndarray) -> list[int]:
    """Sort by score, irrelevant before relevant within a tie, and walk down to the first relevant item."""
    ranks = []
    for scores, truth in zip(similarity, relevant, strict=True):
        order = sorted(range(len(scores)), key=lambda j: (-scores[j], bool(truth[j])))
        ranks.append(next(position for position, j in enumerate(order, start=1) if truth[j]))
    return ranks


@brief
@given(seeds)
def test_ranks_equal_a_sorted_walk(seed: int) -> None:
    similarity, relevant = retrieval(seed)
    ranks = brute_force_ranks(similarity, relevant)

    assert metrics.first_relevant_rank(similarity, relevant).tolist() == ranks
    assert metrics.median_rank(similarity, relevant) == float(np.median(ranks))
    recall = metrics.recall_at_k(similarity, relevant, ks=(1, 3, 15))
    assert recall == {k: sum(r <= k for r in ranks) / len(ranks) for k in (1, 3, 15)}


@brief
@given(seeds)
def test_ranks_do_not_depend_on_the_order_of_items_or_the_scale_of_scores(seed: int) -> None:
    similarity, relevant = retrieval(seed)
    columns = np.random.default_rng(seed).permutation(similarity.shape[1])

    expected = metrics.first_relevant_rank(similarity, relevant)
    np.testing.assert_array_equal(
        metrics.first_relevant_rank(3 * similarity[:, columns] - 7, relevant[:, columns]), expected
    )


@brief
@given(seeds)
def test_recall_is_a_share_that_grows_with_k_and_reaches_one(seed: int) -> None:
    similarity, relevant = retrieval(seed)
    values = list(metrics.recall_at_k(similarity, relevant, ks=range(1, similarity.shape[1] + 1)).values())

    assert all(0.0 <= a <= b <= 1.0 for a, b in itertools.pairwise(values))
    assert values[-1] == 1.0


def test_ranks_of_perfect_retrieval_and_of_collapse() -> None:
    truth = np.eye(20, dtype=bool)

    assert metrics.recall_at_k(truth.astype(float), truth)[1] == 1.0
    assert metrics.median_rank(truth.astype(float), truth) == 1.0
    assert metrics.recall_at_k(np.ones((20, 20)), truth) == {1: 0.0, 5: 0.0, 10: 0.0}
    assert metrics.median_rank(np.ones((20, 20)), truth) == 20.0


def test_recall_refuses_invalid_input() -> None:
    truth = np.eye(3, dtype=bool)
    with pytest.raises(OptionError, match=r"no relevant item, for example query 1"):
        metrics.recall_at_k(np.eye(3), truth & (np.arange(3) != 1)[:, None])
    with pytest.raises(OptionError, match="at least 1"):
        metrics.recall_at_k(np.eye(3), truth, ks=(0, 1))
    with pytest.raises(OptionError, match=r"bool\[3, 3\]"):
        metrics.recall_at_k(np.eye(3), np.eye(3))
    with pytest.raises(OptionError, match="1 rows"):
        metrics.median_rank(np.where(truth & (np.arange(3) == 0), np.nan, 0.0), truth)


# --- generation ------------------------------------------------------------------------------------------------------


def brute_force_mmd2(x: np.ndarray, y: np.ndarray, kernel) -> float:
    """The U-statistic as three loops over pairs."""
    n, m = len(x), len(y)
    xx = [kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j]
    yy = [kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j]
    xy = [kernel(a, b) for a in x for b in y]
    return math.fsum(xx) / len(xx) + math.fsum(yy) / len(yy) - 2 * math.fsum(xy) / len(xy)


@brief
@given(seeds, st.integers(2, 7), st.integers(2, 7), st.integers(1, 5))
def test_kid_and_cmmd_equal_loops_over_pairs(seed: int, n: int, m: int, d: int) -> None:
    x, y = sample(seed, n, d), sample(seed + 1, m, d, shift=0.5)

    expected = brute_force_mmd2(x, y, lambda a, b: (float(np.dot(a, b)) / d + 1) ** 3)
    assert metrics.kid(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-9)

    def unit(v: np.ndarray) -> np.ndarray:
        return v / math.sqrt(sum(c * c for c in v))

    expected = 1000 * brute_force_mmd2(x, y, lambda a, b: math.exp(-(math.dist(unit(a), unit(b)) ** 2) / 200))
    assert metrics.cmmd(x, y) == pytest.approx(expected, rel=1e-7, abs=1e-8)


def test_kid_of_two_gaussians_equals_its_closed_form() -> None:
    """In one dimension E(xy + 1)³ is a polynomial of moments: for N(0,1) and N(1,1) the squared MMD is 22 exactly.

    k(x, y) = Σ c_j (xy)^j with c = 1, 3, 3, 1, so MMD² = Σ c_j (m_j - m'_j)²; the moments are 0, 1, 0 and 1, 2, 4 for
    j = 1, 2, 3.
    """
    exact = 3 * (0 - 1) ** 2 + 3 * (1 - 2) ** 2 + 1 * (0 - 4) ** 2
    estimates = [metrics.kid(sample(s, 400, 1), sample(10_000 + s, 400, 1, shift=1.0)) for s in range(100)]

    assert np.mean(estimates) == pytest.approx(exact, abs=4 * np.std(estimates) / math.sqrt(len(estimates)))


@pytest.mark.parametrize("distance", [metrics.kid, metrics.cmmd])
def test_distances_are_unbiased_symmetric_and_independent_of_order(distance) -> None:
    x, y = sample(1, 40, 8), sample(2, 30, 8, shift=0.3)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-12)
    assert distance(x[::-1], y[::-1]) == pytest.approx(distance(x, y), rel=1e-9)
    assert distance(x, y) > 0.0

    same = [distance(sample(s, 40, 8), sample(5_000 + s, 40, 8)) for s in range(150)]
    assert abs(np.mean(same)) < 4 * np.std(same) / math.sqrt(len(same))  # 0 in the mean, on either side of it
    assert min(same) < 0.0 < max(same)


def test_cmmd_does_not_depend_on_the_length_of_features() -> None:
    x, y = sample(1, 20, 8), sample(2, 20, 8, shift=0.3)
    lengths = np.random.default_rng(3).uniform(0.1, 10.0, (20, 1))
    assert metrics.cmmd(x * lengths, y) == pytest.approx(metrics.cmmd(x, y), rel=1e-9)


@pytest.mark.parametrize("distance", [metrics.kid, metrics.cmmd])
def test_distances_refuse_invalid_input(distance) -> None:
    with pytest.raises(OptionError, match="n at least 2"):
        distance(sample(0, 1, 4), sample(0, 5, 4))
    with pytest.raises(OptionError, match="4 and 3 dimensions"):
        distance(sample(0, 5, 4), sample(0, 5, 3))
    with pytest.raises(OptionError, match="finite, but 1 rows"):
        distance(np.where(np.arange(5)[:, None] == 2, np.nan, sample(0, 5, 4)), sample(0, 5, 4))


@brief
@given(st.integers(1, 255))
def test_psnr_of_a_constant_error(offset: int) -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    expected = 20 * math.log10(255 / offset)
    assert metrics.psnr(black, black + np.uint8(offset)) == pytest.approx(expected)
    scaled = (black / 255).astype(np.float32)
    assert metrics.psnr(scaled, scaled + np.float32(offset / 255)) == pytest.approx(expected, abs=1e-4)
    assert metrics.psnr(black * 2.0 - 1.0, (black + offset) / 127.5 - 1.0, peak=2.0) == pytest.approx(expected)


def test_psnr_of_uniform_noise_and_of_equal_images() -> None:
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (400, 400))
    assert metrics.psnr(noise, np.zeros_like(noise)) == pytest.approx(-10 * math.log10(0.1**2 / 3), abs=0.05)
    assert metrics.psnr(noise, noise) == math.inf


def test_psnr_refuses_different_shapes_and_types() -> None:
    with pytest.raises(OptionError, match="one shape and dtype"):
        metrics.psnr(np.zeros((2, 2), np.uint8), np.zeros((2, 2)))
    with pytest.raises(OptionError, match="peak="):
        metrics.psnr(np.zeros((2, 2), np.int32), np.zeros((2, 2), np.int32))
    with pytest.raises(OptionError, match="NaN"):
        metrics.psnr(np.full((2, 2), np.nan), np.zeros((2, 2)))


# --- collapse and copying --------------------------------------------------------------------------------------------


@brief
@given(seeds, st.lists(st.floats(0.1, 5.0), min_size=1, max_size=5))
def test_effective_rank_of_given_singular_values(seed: int, singular: list[float]) -> None:
    u, v = (np.linalg.qr(sample(seed + i, 6, 6))[0] for i in range(2))  # orthogonal
    x = u[:, : len(singular)] @ np.diag(singular) @ v[: len(singular)]

    shares = [value / math.fsum(singular) for value in singular]
    # exp of the entropy, written as a product: p^(-p) over all shares p
    assert metrics.effective_rank(x) == pytest.approx(math.prod(p**-p for p in shares), rel=1e-6)


@brief
@given(seeds, st.integers(1, 8), st.integers(1, 8))
def test_effective_rank_is_bounded_and_independent_of_order_and_scale(seed: int, n: int, d: int) -> None:
    x = sample(seed, n, d)
    rank = metrics.effective_rank(x)
    assert 1 - 1e-9 <= rank <= min(n, d) + 1e-9
    assert metrics.effective_rank(-3 * x[::-1]) == pytest.approx(rank)


def test_effective_rank_extremes() -> None:
    assert metrics.effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1.0)
    assert metrics.effective_rank(np.eye(7)) == pytest.approx(7.0)
    with pytest.raises(OptionError, match="all zero"):
        metrics.effective_rank(np.zeros((3, 4)))


@brief
@given(hnp.arrays(np.float64, st.tuples(st.integers(2, 8), st.integers(1, 6)), elements=st.floats(0.25, 4.0)), seeds)
def test_mean_pairwise_cosine_equals_a_loop_over_pairs(positive: np.ndarray, seed: int) -> None:
    x = positive * np.random.default_rng(seed).choice([-1.0, 1.0], positive.shape)
    cosine = metrics.mean_pairwise_cosine(x)

    assert cosine == pytest.approx(1 - mean_cosine_distance(x), abs=1e-9)
    assert -1 / (len(x) - 1) - 1e-9 <= cosine <= 1 + 1e-9
    assert metrics.mean_pairwise_cosine(x[::-1] * 2.0) == pytest.approx(cosine, abs=1e-9)


def test_zero_vector_is_refused() -> None:
    with pytest.raises(OptionError, match=r"zero vector.*\[1\]"):
        metrics.mean_pairwise_cosine([[1.0, 0.0], [0.0, 0.0]])


@brief
@given(seeds)
def test_per_prompt_diversity_is_the_mean_over_prompts(seed: int) -> None:
    x = sample(seed, 9, 4)
    prompts = ["boots", "coat", "boots", "hat", "coat", "boots", "coat", "coat", "boots"]  # one hat: left out
    expected = (mean_cosine_distance(x[[0, 2, 5, 8]]) + mean_cosine_distance(x[[1, 4, 6, 7]])) / 2
    assert metrics.per_prompt_diversity(x, prompts) == pytest.approx(expected)

    order = np.random.default_rng(seed).permutation(9)
    assert metrics.per_prompt_diversity(x[order], [prompts[i] for i in order]) == pytest.approx(expected)


def test_per_prompt_diversity_of_a_repeated_image_is_zero() -> None:
    x = sample(0, 2, 4)[[0, 0, 1, 1]]
    assert metrics.per_prompt_diversity(x, ["a", "a", "b", "b"]) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(OptionError, match="at least two"):
        metrics.per_prompt_diversity(x, ["a", "b", "c", "d"])
    with pytest.raises(OptionError, match="3 prompts for 4 rows"):
        metrics.per_prompt_diversity(x, ["a", "b", "c"])


@brief
@given(seeds)
def test_nearest_neighbor_equals_a_loop_over_pairs(seed: int) -> None:
    x, gallery = sample(seed, 5, 4), sample(seed + 1, 7, 4)
    similarity, nearest = metrics.nearest_neighbor_similarity(x, gallery)
    distances = np.array([[cosine_distance(a, b) for b in gallery] for a in x])

    np.testing.assert_allclose(similarity, 1 - distances.min(axis=1), atol=1e-9)
    np.testing.assert_array_equal(nearest, distances.argmin(axis=1))


def test_nearest_neighbor_of_a_copy_is_its_original() -> None:
    gallery = sample(0, 30, 6)
    similarity, nearest = metrics.nearest_neighbor_similarity(5 * gallery[[3, 17]], gallery)
    np.testing.assert_allclose(similarity, 1.0)
    assert nearest.tolist() == [3, 17]
    with pytest.raises(OptionError, match="different models"):
        metrics.nearest_neighbor_similarity(gallery, gallery[:, :3])


# --- how sure we are -------------------------------------------------------------------------------------------------


def test_paired_bootstrap_equals_the_normal_interval_of_paired_differences() -> None:
    """For 400 prompts the mean is normal, with the spread of the *differences*: unpaired, it would be 4 times wider."""
    random = np.random.default_rng(0)
    baseline = random.random(400)
    ours = baseline + random.normal(0.05, 0.1, 400)
    interval = metrics.paired_bootstrap(ours, baseline, resamples=20_000)

    half = 1.959964 * (ours - baseline).std() / math.sqrt(400)
    assert interval.difference == pytest.approx(ours.mean() - baseline.mean())
    assert interval.low == pytest.approx(interval.difference - half, abs=0.05 * half)
    assert interval.high == pytest.approx(interval.difference + half, abs=0.05 * half)


def test_paired_bootstrap_with_seeds_equals_a_loop_over_resampled_rows_and_columns() -> None:
    random = np.random.default_rng(5)
    baseline = random.random((4, 30))
    ours = baseline + random.normal(0.1, 0.1, (4, 1)) + random.normal(0.0, 0.2, (4, 30))
    means = [
        (ours - baseline)[np.ix_(random.integers(0, 4, 4), random.integers(0, 30, 30))].mean() for _ in range(10_000)
    ]
    interval = metrics.paired_bootstrap(ours, baseline, resamples=10_000, confidence=0.9)

    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.05, 0.95])), abs=6e-3)


@brief
@given(
    hnp.arrays(np.float64, hnp.array_shapes(min_dims=1, max_dims=2, min_side=1, max_side=12), elements=st.floats(0, 1)),
    seeds,
)
def test_paired_bootstrap_is_bounded_antisymmetric_and_deterministic(ours: np.ndarray, seed: int) -> None:
    baseline = np.random.default_rng(seed).random(ours.shape)
    interval = metrics.paired_bootstrap(ours, baseline, resamples=200, seed=seed)
    mirrored = metrics.paired_bootstrap(baseline, ours, resamples=200, seed=seed)

    differences = ours - baseline
    assert differences.min() - 1e-9 <= interval.low <= interval.high <= differences.max() + 1e-9
    assert (interval.low, interval.high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)
    assert interval == metrics.paired_bootstrap(ours, baseline, resamples=200, seed=seed)


def test_paired_bootstrap_of_a_constant_gain_has_no_width() -> None:
    baseline = np.random.default_rng(0).random(25)
    interval = metrics.paired_bootstrap(baseline + 0.25, baseline)
    assert (interval.difference, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_paired_bootstrap_refuses_unpaired_scores() -> None:
    with pytest.raises(OptionError, match=r"\(3,\) and \(4,\)"):
        metrics.paired_bootstrap(np.zeros(3), np.zeros(4))
    with pytest.raises(OptionError, match="confidence"):
        metrics.paired_bootstrap(np.zeros(3), np.zeros(3), confidence=95)
    with pytest.raises(OptionError, match="finite"):
        metrics.paired_bootstrap([0.0, np.nan], [0.0, 1.0])
