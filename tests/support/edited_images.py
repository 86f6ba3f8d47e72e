"""Image-to-image and inpainting by the pipelines of diffusers, with our noise and the mean of the VAE."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle

SOURCE = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8))

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "dpm++2m": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
    "flow_euler": "FlowMatchEulerDiscreteScheduler",
}


def edited_by_diffusers(
    kind: str, pipeline: Any, sampler: str, seed: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Any:
    """The result of a diffusers pipeline for a source image.

    Args:
        kind: "Img2Img" or "Inpaint".
        pipeline: the text-to-image pipeline, of Stable Diffusion, Stable Diffusion XL or Stable Diffusion 3.
        sampler: a key of SCHEDULERS.
        seed: of our noise.
        monkeypatch: replaces the noise.
        options: of the call.
    """
    import diffusers
    import torch

    name = type(pipeline).__name__.replace("Pipeline", f"{kind}Pipeline")
    own = {} if "XL" in name or "3" in name else {"requires_safety_checker": False}
    editing = getattr(diffusers, name)(**pipeline.components, **own)
    editing.scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(pipeline.scheduler.config)
    editing.set_progress_bar_config(disable=True)
    stream = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))

    def randn_tensor(shape: Any, **_: Any) -> Any:
        return torch.from_numpy(stream.standard_normal(tuple(shape), dtype=np.float32))

    for module in (type(editing).__module__, type(editing.scheduler).__module__):
        if hasattr(sys.modules[module], "randn_tensor"):
            monkeypatch.setattr(sys.modules[module], "randn_tensor", lambda shape, *_, **kw: randn_tensor(shape, **kw))
    monkeypatch.setattr(
        sys.modules[type(editing).__module__], "retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode()
    )
    return editing("green dotted boots", negative_prompt="blurry", guidance_scale=3.0, **options).images[0]


def edited(bundle: Bundle, sampler: str, strength: float, **options: Any) -> np.ndarray:
    """SOURCE, edited as by `edited_by_diffusers` with the seed 5, in 5 steps."""
    options = {"negative_prompt": "blurry", "guidance_scale": 3.0, "like": SOURCE, "strength": strength} | options
    (image,) = Generator(bundle).generate("green dotted boots", steps=5, sampler=sampler, seed=5, **options)
    return np.asarray(image)
