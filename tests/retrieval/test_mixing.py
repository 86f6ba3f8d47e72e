"""The mixing formula against a plain computation, and its invariance to a modality gap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unidiff_sdk.retrieval.mixing import WEIGHTS, ModalityGap, add_imagined, consensus, mix

DIM = 6


def units(rng: np.random.Generator, n: int) -> np.ndarray:
    rows = rng.normal(size=(n, DIM)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_mix_follows_the_formula() -> None:
    rng = np.random.default_rng(0)
    items, (text, image, unwanted), (caption, neutral) = units(rng, 50), units(rng, 3), units(rng, 2)
    weights = WEIGHTS | {"text": 2.0, "image": 1.0, "without": 0.5}
    query = mix({"text": text, "image": image, "without": unwanted}, weights, ModalityGap(items, caption, neutral))

    shared = neutral - caption  # the direction that mix projects out of a text
    projection = np.eye(DIM) - np.outer(shared, shared) / (shared @ shared)
    vectors = projection @ (text - caption), image, projection @ (unwanted - caption)
    coefficients = np.array([2, 1, -0.5]) / [np.std(items @ vector) for vector in vectors]
    coefficients /= coefficients[0] + coefficients[1]
    expected = sum(c * vector for c, vector in zip(coefficients, vectors, strict=True))
    np.testing.assert_allclose(query, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    ratio=st.sampled_from([0.2, 1.0, 5.0]),
    gap=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    text_spread=st.floats(0.2, 1),
)
def test_mix_ranking_is_invariant_to_a_modality_gap(
    seed: int, ratio: float, gap: tuple[float, float], text_spread: float
) -> None:
    """A modality gap adds one vector to all images and one to all texts, both orthogonal to their meaning (Zhang et al.
    2023, "Diagnosing and Rectifying Vision Models using Language"). Texts may also lie closer together than images."""
    rng = np.random.default_rng(seed)
    items, (text, image, caption, neutral) = units(rng, 40), units(rng, 4)
    weights = WEIGHTS | {"text": ratio}
    plain = items @ mix({"text": text, "image": image}, weights, ModalityGap(items, caption, neutral))

    def apart(rows: np.ndarray, *shared: float) -> np.ndarray:
        return np.concatenate([rows, np.broadcast_to(np.float32(shared), (*rows.shape[:-1], 2))], axis=-1)

    def as_text(row: np.ndarray) -> np.ndarray:
        return apart(text_spread * row, 0.3, gap[1])

    images = apart(items, gap[0], 0)
    moved = {"text": as_text(text), "image": apart(image, gap[0], 0)}
    shifted = images @ mix(moved, weights, ModalityGap(images, as_text(caption), as_text(neutral)))
    scale = np.std(shifted) / np.std(plain)
    np.testing.assert_allclose(shifted - shifted.mean(), scale * (plain - plain.mean()), atol=2e-3)


def test_mix_ignores_a_text_without_meaning() -> None:
    rng = np.random.default_rng(1)
    items, (image, caption, neutral) = units(rng, 40), units(rng, 3)
    meaningless = caption + 0.5 * (neutral - caption)
    query = mix({"text": meaningless, "image": image}, WEIGHTS, ModalityGap(items, caption, neutral))
    assert np.corrcoef(items @ query, items @ image)[0, 1] > 0.9999


def test_mix_of_a_small_catalog_uses_the_weights_alone() -> None:
    rng = np.random.default_rng(0)
    text, image = units(rng, 2)
    zero = np.zeros(DIM, np.float32)
    for items in (units(rng, 0), units(rng, 1), np.repeat(units(rng, 1), 5, axis=0)):
        query = mix({"text": text, "image": image}, WEIGHTS | {"text": 3.0}, ModalityGap(items, zero, zero))
        np.testing.assert_allclose(query, 0.75 * text + 0.25 * image, atol=1e-6)


def test_mix_of_unwanted_parts_alone() -> None:
    rng = np.random.default_rng(0)
    items, (first, second) = units(rng, 30), units(rng, 2)
    zero = np.zeros(DIM, np.float32)
    query = mix({"unlike": first, "without": second}, WEIGHTS, ModalityGap(items, zero, zero))
    assert np.corrcoef(items @ query, items @ first)[0, 1] < -0.3
    assert np.corrcoef(items @ query, items @ second)[0, 1] < -0.3


def test_consensus_favors_images_that_agree_with_the_text() -> None:
    text, *others = np.eye(4, dtype=np.float32)
    images = np.stack([(text + others[0]) / 2**0.5, others[1], others[2]])
    direction = consensus(images, text, 20.0)
    assert np.linalg.norm(direction) == pytest.approx(1) and direction @ images[0] > 0.999
    plain = images.mean(0) / np.linalg.norm(images.mean(0))
    np.testing.assert_allclose(consensus(images, text, 0.0), plain, rtol=1e-6)
    assert np.isfinite(consensus(images, text, 1e4)).all()


def test_add_imagined_sums_z_scores() -> None:
    rng = np.random.default_rng(3)
    items, (query, imagined) = units(rng, 50), units(rng, 2)
    zero = np.zeros(DIM, np.float32)
    weights = WEIGHTS | {"text": 1.0, "image": 0.5, "without": 9.0, "imagined": 0.75}
    mixed = add_imagined(3 * query, imagined, ["text", "image", "without"], weights, ModalityGap(items, zero, zero))
    of_query, of_imagined = items @ query, items @ imagined
    expected = 1.5 * of_query / of_query.std() + 0.75 * of_imagined / of_imagined.std()
    assert np.corrcoef(items @ mixed, expected)[0, 1] > 0.99999
