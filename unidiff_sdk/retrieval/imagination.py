"""Drawing the query: pictures of what a text asks for, to be looked for beside the text itself.

A text and a picture of it are two guesses at the same item: where the encoder mishears a word, the generator may have
heard it. Of several pictures, those that the encoder finds to agree with the text count most: by softmax of their
cosines with it, at the scale that contrast has learned. The similarities to their direction, measured by how far these
tell the catalog's items apart, are added to those of the query, measured by theirs (`query.beside`): a sum of
z-scores, which one query vector computes, so that pages, filters and thresholds go on as they are.

Measured on 3 x 60 captions of held-out synthetic products (split "val") among 500 each, R@1 of whole captions and of
few words: the text alone 0.950 and 0.928; with four pictures at a weight of 0.5, 0.972 and 0.933; without that softmax
0.972 and 0.922; by ranks (RRF) instead 0.911 and 0.872; the pictures alone 0.833 and 0.800. So chosen, on combinations
that training never showed ("test-unseen"): whole captions 0.839 alone and 0.867 with pictures (9 queries of 180 won, 4
lost), few words 0.961 and 0.950 (1 won, 3 lost): it pays where a query tells of much. One picture is too few: 0.828 and
0.939. `benchmarks/imagine.py` measures it against the time that it takes.
"""

from __future__ import annotations

import numpy as np

from unidiff_sdk.store import Vector

__all__ = ["agreed"]


def agreed(pictures: Vector, text: Vector, logit_scale: float) -> Vector:
    """The direction of pictures, weighted by how well each agrees with the text: unit float32[dim].

    Args:
        pictures: unit vectors, float32[n, dim].
        text: a unit vector, float32[dim].
        logit_scale: by which cosines become logits, the inverse of the temperature.
    """
    logits = logit_scale * (pictures @ text)
    weights = np.exp(logits - logits.max())
    direction: Vector = weights @ pictures
    return direction / max(float(np.linalg.norm(direction)), 1e-12)
