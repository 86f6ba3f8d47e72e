"""Images of unusual sizes and modes, as they occur in catalogs."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZES = (
    *((1, 1), (1, 7), (9, 1), (1, 200), (200, 1), (3, 500), (640, 8), (5, 7), (31, 33), (33, 32), (32, 32)),
    *((64, 63), (97, 161), (300, 40), (224, 225), (250, 333)),
)
MODES = ("RGB", "L", "1", "P", "RGBA", "LA", "PA", "CMYK", "YCbCr", "transparent P")


def odd_images(number: int, seed: int = 0) -> list[Image.Image]:
    """Smooth colors with noise. Each size occurs in each mode before a pair of both occurs again."""
    rng = np.random.default_rng(seed)
    pairs = [(size, mode) for size in SIZES for mode in MODES]
    order = rng.permutation(len(pairs))
    return [_image(rng, *pairs[order[n % len(pairs)]]) for n in range(number)]


def _image(rng: np.random.Generator, size: tuple[int, int], mode: str) -> Image.Image:
    coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 4), dtype=np.uint8), "RGBA").resize(size)
    noisy = np.asarray(coarse, np.int64) + rng.integers(-30, 30, (size[1], size[0], 4))
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "RGBA")
    if mode == "transparent P":
        palette = image.convert("RGB").quantize(16)
        palette.info["transparency"] = 3
        return palette
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    return image.convert("RGB").convert("P" if mode == "PA" else mode).convert(mode)
