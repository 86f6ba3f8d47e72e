"""Whether an image is the same when it is generated alone and in a batch with others."""

from __future__ import annotations

import numpy as np

from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle


def batch_differences(bundle: Bundle) -> tuple[int, int]:
    """The largest difference of a pixel value (0 to 255) between an image generated in a batch and alone.

    The first number is for a generator whose UNet calls are shared by several images, the second for one whose calls
    have one image each.
    """
    worst = []
    for generator in (Generator(bundle), Generator(bundle, positions=1)):
        batch = generator.generate(["coat", "red boots"], n=5, seed=3, steps=3)[5:]
        alone = [generator.generate("red boots", seed=3 + k, steps=3)[0] for k in range(5)]
        worst.append(max(int(np.abs(np.asarray(a).astype(int) - b).max()) for a, b in zip(alone, batch, strict=True)))
    return worst[0], worst[1]
