"""The image preprocessing of a CLIP: which configurations are followed, and the normalization that they amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image

__all__ = ["normalization", "preprocessing_refusal"]

MAX_NUMBER = 1e6
"""The largest mean, standard deviation and scale; models have numbers up to 255."""


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
        if isinstance(value, dict) and isinstance(given, Mapping):
            given = {key: each for key, each in given.items() if each is not None}
        if given != value:
            return (
                f"{name} {given!r} of the image preprocessing is not supported, only {value!r}: use a CLIP that "
                "resizes the shorter edge by bicubic interpolation and crops the center"
            )
    return _refused_numbers(config)


def _refused_numbers(config: Mapping[str, Any]) -> str | None:
    """Why the scale or the normalization cannot be computed."""
    scale: Any = config.get("rescale_factor")
    if config.get("do_rescale") and not (_is_number(scale) and scale > 0):
        return f"rescale_factor {scale!r:.60} of the image preprocessing is not a number above 0"
    if not config.get("do_normalize"):
        return None
    for name in ("image_mean", "image_std"):
        values = config.get(name)
        if not (isinstance(values, (list, tuple)) and len(values) == 3 and all(map(_is_number, values))):
            return f"{name} {values!r:.60} of the image preprocessing is not a list of three numbers"
        if name == "image_std" and min(values) <= 0:
            return f"{name} {values!r:.60} of the image preprocessing must be above 0"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


def normalization(processor: Any) -> tuple[Any, Any]:
    """(mean, standard deviation), each of the three RGB channels, by which pixels in [0, 1] are normalized."""
    mean, std = (0.0,) * 3, (1.0,) * 3
    if processor.do_normalize:
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    if math.isclose(scale, 1):
        return mean, std
    # (scale * pixel - mean) / std = (pixel - mean / scale) / (std / scale)
    return tuple(value / scale for value in mean), tuple(value / scale for value in std)
