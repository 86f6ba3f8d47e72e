"""Starting from a picture instead of from noise: image-to-image and inpainting (SDEdit, Meng et al. 2022).

"SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations" (arXiv:2108.01073): noise is added
to a picture up to some step of the schedule, and taken away again under the prompt. Inpainting puts back, after each
step, the known part with the noise of that step, as diffusers does for UNets without mask channels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unidiff_sdk._internal.images import Fit, HasImage, ImageSource, load_image
from unidiff_sdk.errors import ImageError, OptionError

from .options import LoadsImage

__all__ = ["first_step", "fitted", "latent_mask", "load_mask", "put_back", "read_image", "to_samples"]

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

_HALF = 128  # of 255: brighter is repainted


def read_image(source: ImageSource | HasImage | LoadsImage) -> Image.Image:
    """The RGB image of a file, of bytes, of pixels, or of an object that carries one. Raises ImageError."""
    if isinstance(source, LoadsImage):
        return source.load_image()
    return load_image(source.image if isinstance(source, HasImage) else source)


def first_step(strength: float, steps: int) -> int:
    """Index of the first step to run, so that the share `strength` of `steps` is left.

    Raises:
        OptionError: no step is left.
    """
    left = int(steps * strength)
    if left == 0:
        least = math.ceil(1000 / steps) / 1000
        raise OptionError(f"strength is {strength!r}, which leaves none of {steps} steps; give at least {least:g}")
    return steps - left


def fitted(image: Image.Image, width: int, height: int, fit: Fit = "crop", around: str = "white") -> Image.Image:
    """A picture brought to size without distortion: its middle ("crop"), or all of it on a plain ground ("pad")."""
    if image.size == (width, height):
        return image
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=around)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_samples(image: Image.Image) -> Float32:
    """An RGB image as the VAE encoder takes it: float32[1, 3, height, width] in [-1, 1]."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    samples: Float32 = pixels / np.float32(127.5) - np.float32(1)
    return samples


def load_mask(mask: Any, width: int, height: int, fit: Fit = "crop") -> Bool:
    """Where to repaint: bool[height, width], from a picture that is bright there.

    Raises:
        ImageError: it cannot be read as a picture.
        OptionError: it is dark everywhere.
    """
    try:
        grey = fitted(read_image(mask).convert("L"), width, height, fit, "black")
    except ImageError as error:
        raise ImageError(f"the mask cannot be used: {error}") from error
    repaint: Bool = np.asarray(grey) >= _HALF
    if not repaint.any():
        raise OptionError("the mask is dark everywhere, so nothing would be repainted; make it white where to repaint")
    return repaint


def latent_mask(repaint: Bool, scale: int) -> Float32:
    """The same in latents: float32[1, height / scale, width / scale]; 1 wherever any pixel is repainted."""
    height, width = repaint.shape
    blocks = repaint.reshape(height // scale, scale, width // scale, scale)
    touched: Bool = np.logical_or.reduce(blocks, axis=(1, 3))
    return touched[None].astype(np.float32)


def put_back(image: Image.Image, original: Image.Image, repaint: Bool) -> Image.Image:
    """`image` where it was repainted, and `original`, pixel for pixel, where not."""
    return Image.composite(image, original, Image.fromarray(repaint))
