"""Mix the parts of a query (texts, images, items, vectors) into one query vector.

**The formula.** CLIP embeds texts and images in separate regions, the modality gap (Liang et al. 2022, "Mind the Gap").
The cosines of a text with the images of a catalog are small and close together; those of an image are large and widely
spread. In a plain sum the image therefore dominates. `mix` scales each part k by how widely its scores spread over the
catalog, and first removes from a text the part of its embedding that does not depend on its meaning:

    q = Σ_k c_k u_k        c_k = ± w_k / σ_k

- u_k is the unit vector of an image, an item or a raw vector. For a text t it is t - m without its component along
  n - m. Here m is the mean embedding of some captions of the catalog, so what all texts share, and n the mean embedding
  of a few neutral texts; every text that leaves something open leans toward n.
- σ_k is the standard deviation of the dot products of u_k with a sample of the catalog's items.
- w_k is the weight of the part. The sign is minus for unwanted parts (`unlike`, `without`).

The c_k are scaled so that those of the wanted parts sum to 1, which keeps scores near the range of a cosine. A query of
one part is not mixed: its score is the plain cosine.

Measured with the built-in model: "a green handbag" with the image of a red one, and the share of first hits that are
right in type and color, over four synthetic catalogs of 300 to 500 products, with 150 to 300 images that are in none of
them. With weights of 0.7 and 0.3: 0.90 (plain sums: 0.93), with equal weights 0.68 (0.62), and with "green" alone as
the text 0.60 (0.53). That model has hardly a gap. With an artificial gap, one vector that all images share and one that
all texts share, each 0.6 of the squared norm, the formula keeps 0.91, 0.68 and 0.59, and plain sums fall to 0.82, 0.57
and 0.48.

**Generated images.** With `imagine`, the generator makes images from the text query, and the search uses both. A text
and an image of it are two estimates of the same item: the generator may render a word that the encoder misses. The
images are averaged by `consensus`: images that the encoder finds closer to the text have a larger weight, the softmax
of their cosines at the learned logit scale. `add_imagined` then adds the scores of that direction to those of the
query, each divided by its standard deviation over the catalog. This sum of z-scores is again one query vector, so
pages, filters and thresholds work as for any other query.

Measured on 3 x 60 captions of held-out synthetic products (split "val") among 500 each, R@1 of whole captions and of
short queries: the text alone 0.950 and 0.928; with four images at a weight of 0.5, 0.972 and 0.933; without the softmax
0.972 and 0.922; fused by rank (RRF) instead 0.911 and 0.872; the images alone 0.833 and 0.800. The chosen variant on
combinations that training never showed ("test-unseen"): whole captions 0.839 alone and 0.867 with images (9 queries of
180 won, 4 lost), short queries 0.961 and 0.950 (1 won, 3 lost). Generated images help long, detailed queries. One image
is too few: 0.828 and 0.939. `benchmarks/imagine.py` measures the gain against the time it takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np

from unidiff_sdk.store import Vector

__all__ = ["NEUTRAL_TEXTS", "WEIGHTS", "ModalityGap", "add_imagined", "consensus", "mean_direction", "mix"]

WEIGHTS = {"text": 1.0, "imagined": 0.5, "image": 1.0, "like": 1.0, "vector": 1.0, "unlike": 0.5, "without": 0.5}
"""The parts of a query and their default weights.

"without" at half the weight excludes most of what is unwanted and keeps the rest of the query; at the full weight it
overrides the query. "imagined" are the images generated from the text.
"""

NEUTRAL_TEXTS = ("a photo", "a picture of something", "a product")
"""Texts without a meaning of interest."""

_UNWANTED = ("unlike", "without")
_TEXTS = ("text", "without")
_SMALLEST_SPREAD = 1e-6  # of scores; below that the items of the sample are the same
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class ModalityGap:
    """What `mix` needs from a catalog to compare texts with images.

    Attributes:
        sample: embeddings of some items, float32[n, dim].
        caption_mean: the mean embedding of some captions, float32[dim]; zero if there are none.
        neutral_mean: the mean embedding of `NEUTRAL_TEXTS`, float32[dim].
    """

    sample: Vector
    caption_mean: Vector
    neutral_mean: Vector

    def project_out(self, text: Vector) -> Vector:
        """Remove from a text embedding what all captions share and what neutral texts express."""
        neutral = self.neutral_mean - self.caption_mean
        centered = text - self.caption_mean
        along = (centered @ neutral) / max(float(neutral @ neutral), _SMALLEST_NORM)
        return cast(Vector, centered - along * neutral)


def mix(parts: Mapping[str, Vector], weights: Mapping[str, float], gap: ModalityGap) -> Vector:
    """The query vector of several parts.

    Args:
        parts: unit vectors, float32[dim], by their names in `WEIGHTS`.
        weights: the weight of each part.
        gap: a sample of the catalog.

    Returns:
        float32[dim], not normalized.
    """
    vectors = {part: gap.project_out(vector) if part in _TEXTS else vector for part, vector in parts.items()}
    return _standardized_sum(vectors, {part: _sign(part) * weights[part] for part in parts}, gap.sample)


def add_imagined(
    query: Vector, imagined: Vector, parts: Iterable[str], weights: Mapping[str, float], gap: ModalityGap
) -> Vector:
    """Add generated images to a query vector. The query's own ranking is one of the two terms, unchanged.

    Args:
        query: the query vector without the images, float32[dim].
        imagined: the direction of the images (`consensus`), float32[dim].
        parts: the parts of `query`; its weight is the sum of the weights of the wanted ones.
        weights: of the parts and of "imagined".
        gap: a sample of the catalog.

    Returns:
        float32[dim], not normalized.
    """
    weight = sum(weights[part] for part in parts if part not in _UNWANTED)
    both = {"query": query, "imagined": imagined}
    return _standardized_sum(both, {"query": weight, "imagined": weights["imagined"]}, gap.sample)


def consensus(images: Vector, text: Vector, logit_scale: float) -> Vector:
    """The mean direction of images of a text, weighted by how well each agrees with it: unit float32[dim].

    Args:
        images: unit vectors, float32[n, dim].
        text: a unit vector, float32[dim].
        logit_scale: the factor from cosines to logits, the inverse of the temperature.
    """
    logits = logit_scale * (images @ text)
    weights = np.exp(logits - logits.max())
    direction: Vector = weights @ images
    return direction / max(float(np.linalg.norm(direction)), _SMALLEST_NORM)


def mean_direction(vectors: Iterable[Vector]) -> Vector:
    """The mean of some vectors as a unit vector, float32[dim]."""
    mean = np.mean(list(vectors), axis=0)
    return cast(Vector, (mean / max(float(np.linalg.norm(mean)), _SMALLEST_NORM)).astype(np.float32))


def _sign(part: str) -> int:
    return -1 if part in _UNWANTED else 1


def _standardized_sum(vectors: Mapping[str, Vector], weights: Mapping[str, float], sample: Vector) -> Vector:
    """The sum of vectors, each divided by the spread of its scores; positive coefficients sum to 1."""
    spreads = {part: _score_spread(vector, sample) for part, vector in vectors.items()}
    if not all(spreads.values()):  # the sample holds fewer than two different items
        spreads = dict.fromkeys(spreads, 1.0)
    coefficients = {part: weights[part] / spread for part, spread in spreads.items()}
    scale = sum(c for c in coefficients.values() if c > 0) or sum(abs(c) for c in coefficients.values())
    return cast(Vector, sum(c / scale * vectors[part] for part, c in coefficients.items())).astype(np.float32)


def _score_spread(vector: Vector, sample: Vector) -> float:
    """The standard deviation of a vector's scores over a sample; 0 if they are all the same."""
    spread = float((sample @ vector).std()) if len(sample) else 0.0
    return spread if spread > _SMALLEST_SPREAD else 0.0
