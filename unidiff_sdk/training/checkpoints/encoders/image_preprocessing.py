"""Image preprocessing: which configurations are followed, and the resizing and normalization that they amount to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import transformers
from PIL import Image

from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.manifest import MAX_IMAGE_SIDE, ImageInput, Patches, Resize

__all__ = ["image_input", "image_processor_class", "normalization", "patch_input", "preprocessing_refusal"]

# Families of image processors whose steps are followed. BitImageProcessor has the steps and the defaults of CLIP's.
FAMILIES = {"CLIP": "CLIP", "Bit": "CLIP", "Siglip": "Siglip", "Siglip2": "Siglip2", "ViT": "ViT"}
NAME = re.compile(r"([A-Za-z0-9]+?)(ImageProcessor(Fast|Pil)?|FeatureExtractor)")

MAX_PATCHES = 4096
MAX_NUMBER = 1e6
"""The largest mean, standard deviation and scale; models have numbers up to 255."""


def image_processor_class(name: str) -> Any:
    """The class of transformers, with the backend of Pillow, for the name of an image processor.

    Raises CheckpointError for one whose steps are not followed.
    """
    match = NAME.fullmatch(name)
    if match is None or match[1] not in FAMILIES:
        raise CheckpointError(
            f"the image preprocessing {name!r:.60} is not supported, only that of {', '.join(FAMILIES)}: use a model "
            "with one of these"
        )
    family = f"{FAMILIES[match[1]]}ImageProcessor"
    # The class without torchvision has another name in transformers 5. Version 4.57 has only one class.
    return getattr(transformers, f"{family}Pil", None) or getattr(transformers, family)


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
            given = _given(given)
        if given != value:
            return (
                f"{name} {given!r} of the image preprocessing is not supported, only {value!r}: use a CLIP that "
                "resizes the shorter edge by bicubic interpolation and crops the center"
            )
    return _refused_numbers(config)


def image_input(processor: Any, image_size: int, fit: Fit = "crop") -> ImageInput:
    """The steps of an image processor of transformers: resize, center crop, rescale, normalize.

    Args:
        processor: the image processor.
        image_size: side, in pixels, of the square that the image encoder takes.
        fit: "pad" for a model that was trained on padded images; its other steps must then be those of CLIP.

    Raises:
        CheckpointError: A step that is not followed. The message names it.
    """
    refused = (preprocessing_refusal if fit == "pad" else _refused_steps)(processor, image_size)
    if refused:
        raise CheckpointError(refused)
    mean, std = normalization(processor)
    resize = None if fit == "pad" else _resize(processor.to_dict())
    return ImageInput(
        size=image_size, mean=mean, std=std, fit=fit, resize=None if resize == Resize(image_size) else resize
    )


def patch_input(processor: Any, patch_size: int, fit: Fit = "crop") -> ImageInput:
    """The steps of `Siglip2ImageProcessor`: resize to a number of patches, rescale, normalize.

    Args:
        processor: the image processor.
        patch_size: side, in pixels, of the patches that the image encoder takes.
        fit: only "crop", as nothing is padded.

    Raises:
        CheckpointError: A step that is not followed. The message names it.
    """
    config = processor.to_dict()
    expected = {"do_resize": True, "patch_size": patch_size}
    for name, value in expected.items():
        if config.get(name) != value:
            raise CheckpointError(f"{name} {config.get(name)!r:.60} of the image preprocessing must be {value}")
    if fit != "crop":
        raise CheckpointError("a NaFlex model takes images in their own aspect ratio, so they cannot be padded")
    if config.get("resample") not in [int(each) for each in Image.Resampling]:
        raise CheckpointError(f"resample {config.get('resample')!r:.60} of the image preprocessing is not of Pillow")
    count = config.get("max_num_patches")
    if not _is_side(count) or count > MAX_PATCHES:
        raise CheckpointError(f"max_num_patches {count!r:.60} of the image preprocessing must be 1 to {MAX_PATCHES:,}")
    if refused := _refused_numbers(config):
        raise CheckpointError(refused)
    mean, std = normalization(processor)
    interpolation: Any = Image.Resampling(config["resample"]).name.lower()
    side = patch_size * math.isqrt(count)
    return ImageInput(size=side, mean=mean, std=std, patches=Patches(patch_size, count, interpolation))


def _resize(config: Mapping[str, Any]) -> Resize:
    """The resizing of a configuration without refused steps."""
    size = _given(config.get("size"))
    interpolation: Any = Image.Resampling(config["resample"]).name.lower()
    return Resize(size.get("shortest_edge") or size["height"], "shortest_edge" not in size, interpolation)


def _refused_steps(processor: Any, image_size: int) -> str | None:
    """Why the steps of an image processor cannot be followed; None if they can."""
    config = processor.to_dict()
    for name, value in (("do_resize", True), ("do_pad", False)):
        if bool(config.get(name)) is not value:
            return f"{name} {config.get(name)!r:.60} of the image preprocessing is not supported, only {value}"
    size = _given(config.get("size"))
    if not (set(size) == {"shortest_edge"} or (set(size) == {"height", "width"} and size["height"] == size["width"])):
        return (
            f"size {config.get('size')!r:.90} of the image preprocessing is not supported: images must be resized to a "
            "shortest_edge, or to a height and an equal width"
        )
    if not all(_is_side(side) for side in size.values()):
        return f"size {config.get('size')!r:.90} of the image preprocessing must be 1 to {MAX_IMAGE_SIDE:,} pixels"
    if config.get("resample") not in [int(each) for each in Image.Resampling]:
        return f"resample {config.get('resample')!r:.60} of the image preprocessing is not a filter of Pillow"
    square = {"height": image_size, "width": image_size}
    crop = _given(config.get("crop_size")) if config.get("do_center_crop") else size
    if crop != square:
        return (
            f"the image preprocessing returns {crop!r:.90}, but the image encoder takes {square}: use a model that "
            "crops the center to this size, or resizes both edges to it"
        )
    return _refused_numbers(config)


def _given(size: Any) -> dict[str, Any]:
    """The keys of a size that have a value."""
    return {key: each for key, each in size.items() if each is not None} if isinstance(size, Mapping) else {}


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_IMAGE_SIDE


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
