"""How equal a picture is to itself, drawn alone and beside others."""

from __future__ import annotations

import numpy as np

from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle


def differences(bundle: Bundle) -> tuple[int, int]:
    """The largest difference of a pixel, of 255: where calls are shared, and where each picture has its own."""
    worst = []
    for generator in (Generator(bundle), Generator(bundle, positions=1)):
        beside = generator.generate(["coat", "red boots"], n=5, seed=3, steps=3)[5:]
        alone = [generator.generate("red boots", seed=3 + k, steps=3)[0] for k in range(5)]
        worst.append(max(int(np.abs(np.asarray(a).astype(int) - b).max()) for a, b in zip(alone, beside, strict=True)))
    return worst[0], worst[1]
