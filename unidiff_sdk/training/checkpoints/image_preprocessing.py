"""The image preprocessing of a CLIP: which configurations are followed, and the normalization that they amount to."""

from __future__ import annotations

import math
from typing import Any

from PIL import Image

__all__ = ["normalization", "preprocessing_refusal"]


def preprocessing_refusal(processor: Any, image_size: int) -> str | None:
    """Why an image processor is not supported. None for the steps of CLIP.

    They are: shorter edge to `image_size` (bicubic), center crop, any scale, any normalization or none.
    """
    config = processor.to_dict()
    expected = {
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
    }
    for name, value in expected.items():
        given = config.get(name)
        if isinstance(value, dict) and given is not None:
            given = {key: each for key, each in dict(given).items() if each is not None}
        if given != value:
            return (
                f"{name} {given!r} of the image preprocessing is not supported, only {value!r}: use a CLIP that "
                "resizes the shorter edge by bicubic interpolation and crops the center"
            )
    return None


def normalization(processor: Any) -> tuple[Any, Any]:
    """(mean, standard deviation), each of the three RGB channels, by which pixels in [0, 1] are normalized."""
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    if not processor.do_normalize:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if math.isclose(scale, 1):
        return mean, std
    # (scale * pixel - mean) / std = (pixel - mean / scale) / (std / scale)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
