"""A small reference for tests of the export."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from PIL import Image

from unidiff_export.pipeline import GeneratedImages, ReferenceEmbeddings
from unidiff_export.reference import Reference, Samples

UNIT = np.eye(2, 4, dtype=np.float32)


def gray_reference(**changes: Any) -> Reference:
    """Two gray images, each the only relevant one for its caption."""
    images = (np.full((8, 8, 3), 130, np.uint8),) * 2
    noise = np.zeros((2, 4, 4, 4), np.float32)
    generated = GeneratedImages(("a", "b"), "", noise, torch.zeros(2, 4, 4, 4), images, ())
    searched = Samples(("a", "b"), images)
    odd = ReferenceEmbeddings(("", "b"), tuple(map(Image.fromarray, images)), UNIT, UNIT)
    reference = Reference(
        generated=generated,
        sampler="dpm++2m",
        steps=4,
        guidance_scale=2.0,
        searched=searched,
        embeddings=(UNIT, UNIT),
        odd=odd,
        agreement=1.0,
        inputs={},
    )
    return dataclasses.replace(reference, **changes)
