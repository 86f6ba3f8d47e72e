"""Stateless randomness: every random number follows from the run's seed, its purpose and the step.

There is no generator state to save. A run resumed at step k makes the choices that it would have made without the
interruption, and all processes make the same choices for the whole batch.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

__all__ = ["Purpose", "derive_seed", "seeded_generator"]


class Purpose(IntEnum):
    """Purpose of a random stream. Streams of different purposes are independent: a loss does not change the batches."""

    ORDER = 0
    MIRROR = 1
    NOISE = 2
    WEIGHTS = 3
    DROPOUT = 4
    PRIOR = 5
    VALIDATION = 6
    SCORE = 7
    NEGATIVES = 8
    REWARD = 9


def derive_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """A 64-bit seed that follows from the arguments."""
    return int(np.random.SeedSequence([seed, purpose, *key]).generate_state(1, np.uint64)[0])


def seeded_generator(seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """A CPU generator that follows from the arguments, so that one seed gives one run on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *key))
