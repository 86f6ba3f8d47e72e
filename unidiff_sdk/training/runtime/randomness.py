"""Chance without state: whatever is drawn in a run follows from its seed, its purpose and its step alone.

So there is no generator to save: a run that goes on at step k draws what it would have drawn without the interruption,
and every process of several draws the same for the whole batch.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

__all__ = ["Purpose", "generator", "seed_of"]


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent, so that losses do not change the batches."""

    ORDER = 0
    MIRROR = 1
    NOISE = 2
    WEIGHTS = 3
    DROPOUT = 4
    PRIOR = 5
    VALIDATION = 6


def seed_of(seed: int, purpose: Purpose, *key: int) -> int:
    """A seed of 64 bits that follows from its arguments."""
    return int(np.random.SeedSequence([seed, purpose, *key]).generate_state(1, np.uint64)[0])


def generator(seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """A CPU generator that follows from its arguments: one seed gives one run, on every device."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, *key))
