"""Generation that starts from an image: image-to-image and inpainting.

Meng et al. 2022, "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations"
(arXiv:2108.01073): noise is added to the image up to some step of the schedule, and removed again under the prompt.
Inpainting restores, after each step, the known region with the noise of that step, as diffusers does for UNets without
mask channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from unidiff_sdk._internal.images import Fit, HasImage, ImageSource, load_image
from unidiff_sdk.errors import ImageError, OptionError

from .options import LoadsImage, ResolvedOptions

__all__ = ["SourceImage", "first_step", "fit_image", "load_mask", "load_source", "to_samples"]

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

BRIGHT = 128  # of 255
KEEP = "black"  # the color of a mask where the image is kept: also behind its transparent pixels and around it


@dataclass(frozen=True)
class SourceImage:
    """The image that a generation starts from.

    Attributes:
        image: RGB, at the size of the result.
        latents: float32[channels, height, width].
        repaint: with a mask, where to repaint: bool[height, width], in pixels.
    """

    image: Image.Image
    latents: Float32
    repaint: Bool | None

    def latent_mask(self, scale: int) -> Float32:
        """Where to repaint the latents: float32[1, height / scale, width / scale]; 1 where any pixel is repainted."""
        assert self.repaint is not None
        height, width = self.repaint.shape
        blocks = self.repaint.reshape(height // scale, scale, width // scale, scale)
        touched: Bool = np.logical_or.reduce(blocks, axis=(1, 3))
        return touched[None].astype(np.float32)

    def restore(self, image: Image.Image) -> Image.Image:
        """`image` where it was repainted; everywhere else the pixels of the source."""
        return image if self.repaint is None else Image.composite(image, self.image, Image.fromarray(self.repaint))


def load_source(options: ResolvedOptions, fit: Fit, encode: Callable[[Image.Image], Float32]) -> SourceImage | None:
    """The image and the mask of the options, if there are any. `encode` returns the latents of an image.

    Raises:
        ImageError: the image or the mask cannot be read.
        OptionError: the mask is dark everywhere.
    """
    if options.like is None:
        return None
    width, height = options.width, options.height
    image = fit_image(_read(options.like), width, height, fit)
    repaint = None if options.mask is None else load_mask(options.mask, width, height, fit)
    return SourceImage(image, encode(image), repaint)


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


def load_mask(mask: ImageSource | HasImage | LoadsImage, width: int, height: int, fit: Fit = "crop") -> Bool:
    """Where to repaint: bool[height, width], true where the mask is bright and not transparent.

    Raises:
        ImageError: the mask cannot be read.
        OptionError: the mask is dark everywhere.
    """
    try:
        gray = fit_image(_read(mask, KEEP).convert("L"), width, height, fit, KEEP)
    except ImageError as error:
        raise ImageError(f"the mask cannot be used: {error}") from error
    repaint: Bool = np.asarray(gray) >= BRIGHT
    if not repaint.any():
        raise OptionError("the mask is dark everywhere, so nothing would be repainted; make it white where to repaint")
    return repaint


def fit_image(image: Image.Image, width: int, height: int, fit: Fit, background: str = "white") -> Image.Image:
    """An image at a size, without distortion: its center ("crop"), or all of it on a background ("pad")."""
    if image.size == (width, height):
        return image
    if fit == "pad":
        return ImageOps.pad(image, (width, height), Image.Resampling.LANCZOS, color=background)
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_samples(image: Image.Image) -> Float32:
    """An RGB image as the VAE encoder takes it: float32[1, 3, height, width] in [-1, 1]."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None]
    samples: Float32 = pixels / np.float32(127.5) - np.float32(1)
    return samples


def _read(source: ImageSource | HasImage | LoadsImage, background: str = "white") -> Image.Image:
    if isinstance(source, LoadsImage):
        return source.load_image()
    return load_image(source.image if isinstance(source, HasImage) else source, background=background)
