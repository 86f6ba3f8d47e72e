"""Drawing the query: pictures of what a text asks for, to be looked for beside the text itself.

A text and a picture of it are two guesses at the same item: where the encoder mishears a word, the generator may have
heard it. How both are weighed is told in `query`: the direction of the drawn pictures is one more part of the mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from .generator import Generator

__all__ = ["MOST_IMAGINED", "draw_queries"]

MOST_IMAGINED = 16  # for one text
_SEED = 0  # always the same, so that a search repeated finds the same
# Half of what a picture takes that is looked at: enough for the encoder to tell what it shows.
_MOST_STEPS = 6


def draw_queries(generator: Generator, texts: Sequence[str], n: int) -> list[Image.Image]:
    """`n` pictures of each text, those of the first text first; the same for the same texts.

    In few steps: the bundle's own number, if that is less than six.
    """
    steps = min(generator.settings().steps, _MOST_STEPS)
    return generator.generate(texts, n=n, seed=_SEED, steps=steps)
