"""The evidence that a bundle carries: its graphs and its pictures beside PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from unidiff_sdk.errors import ExportError, GenerationError

from .lowering import GraphSpec, quiet

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from numpy.typing import NDArray
    from onnxruntime import InferenceSession

    from unidiff_sdk.bundle import Bundle
    from unidiff_sdk.training.checkpoint import Checkpoint

PROMPTS = ("a red dress", "blue striped boots")
# Of equal pictures the ratio is infinite, which JSON cannot say.
MOST_PSNR_DB = 100.0
# A picture whose brightest level is below this, of 255, is black.
BLACK = 8


@dataclass(frozen=True)
class Tolerance:
    """How far a bundle of one precision may be from PyTorch."""

    max_abs_error: float
    image_psnr_db: float


TOLERANCES = {"fp32": Tolerance(1e-4, 40.0), "fp16": Tolerance(5e-2, 35.0)}


@dataclass(frozen=True)
class GraphParity:
    """One graph against its PyTorch module: over all outputs and shapes tried, the worst figures."""

    max_abs_error: float
    cosine: float
    tolerance: float


@dataclass(frozen=True)
class ImageParity:
    """Whole pictures of the runtime against those of diffusers' pipeline, from the same latents: the worst one."""

    psnr_db: float
    tolerance_db: float


def compare_graph(session: InferenceSession, spec: GraphSpec, tolerance: float) -> GraphParity:
    """Run `spec`'s module and its graph on the same inputs, at two shapes, neither of them that of the tracing.

    Raises ExportError where the graph's result has another shape, is not finite, or lies outside `tolerance`.
    """
    errors, cosines = [], []
    for batch, scale in ((3, 1), (1, 2)):
        inputs = spec.example(batch, scale)
        with torch.no_grad():
            expected = spec.module(*inputs)
        got = session.run(list(spec.outputs), dict(zip(spec.inputs, (x.numpy() for x in inputs), strict=True)))
        references = expected if isinstance(expected, tuple) else (expected,)
        for name, ours, reference in zip(spec.outputs, got, references, strict=True):
            errors.append(max_abs_error(f"{spec.name}'s {name}", ours, reference.numpy()))
            cosines.append(cosine(ours, reference.numpy()))
    parity = GraphParity(max(errors), min(cosines), tolerance)
    if parity.max_abs_error > tolerance:
        raise ExportError(
            f"{spec.name} differs from PyTorch by up to {parity.max_abs_error:.2g} (allowed: {tolerance:.0e}); "
            "try --fp32 if this was another precision, else the package versions of constraints.txt"
        )
    return parity


def max_abs_error(what: str, ours: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """The largest difference. Raises ExportError, naming `what`, if shapes differ or a value is not finite."""
    if ours.shape != reference.shape:
        raise ExportError(f"{what} has shape {ours.shape}, but PyTorch's has {reference.shape}")
    if not np.isfinite(reference).all():
        raise ExportError(f"{what} is not finite in PyTorch already: the checkpoint is broken; train again or go back")
    if not np.isfinite(ours).all():
        raise ExportError(f"{what} is not finite, where PyTorch's is: a number overflowed; try --fp32")
    return float(np.abs(ours - reference).max())


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Cosine of the angle between two arrays, flattened."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), np.finfo(np.float64).tiny))


def compare_images(bundle: Bundle, checkpoint: Checkpoint, tolerance_db: float) -> ImageParity:
    """Generate with our runtime and with diffusers' StableDiffusionPipeline, from the same latents, and compare.

    Raises ExportError where a picture is black or the ratio of signal to difference is below `tolerance_db`.
    """
    from unidiff_sdk.generator import Generator

    sampler = bundle.manifest["sampler"]
    scheduler, name = reference_scheduler(sampler["name"], checkpoint)
    latent = bundle.manifest["latent"]
    shape = (len(PROMPTS), latent["channels"], latent["size"], latent["size"])
    noise = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    settings = {"steps": sampler["steps"], "guidance_scale": sampler["guidance_scale"]}

    try:
        ours = Generator(bundle).generate(PROMPTS, sampler=name, latents=noise, **settings)
    except GenerationError as error:
        raise ExportError("the bundle's pictures are not finite: a number overflowed; try --fp32") from error
    reference = diffusers_images(checkpoint, scheduler, PROMPTS, noise, **settings)
    for prompt, image in zip(PROMPTS, ours, strict=True):
        if np.asarray(image).max() < BLACK:
            raise ExportError(f"the picture of {prompt!r} is black; try --fp32, or look at what the checkpoint draws")
    parity = ImageParity(min(map(psnr_db, map(np.asarray, ours), reference)), tolerance_db)
    if parity.psnr_db < tolerance_db:
        raise ExportError(
            f"pictures are only {parity.psnr_db:.1f} dB PSNR from those of diffusers with the same latents "
            f"(at least {tolerance_db:.0f} dB asked); try --fp32 if this was another precision"
        )
    return parity


def reference_scheduler(sampler: str, checkpoint: Checkpoint) -> tuple[SchedulerMixin, str]:
    """diffusers' scheduler for our sampler of that name, and the name; DDIM for those that draw fresh noise."""
    import diffusers

    config = checkpoint.scheduler.config
    if sampler in ("euler", "euler_karras"):
        karras = sampler.endswith("karras")
        return diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=karras), sampler
    if sampler in ("dpm++2m", "dpm++2m_karras"):
        karras = sampler.endswith("karras")
        return diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=karras), sampler
    return diffusers.DDIMScheduler.from_config(config), "ddim"


def diffusers_images(
    checkpoint: Checkpoint,
    scheduler: SchedulerMixin,
    prompts: Sequence[str],
    latents: NDArray[np.float32],
    *,
    steps: int,
    guidance_scale: float,
) -> list[NDArray[np.uint8]]:
    """What diffusers' own pipeline draws in float32 PyTorch: uint8[height, width, 3] for each prompt."""
    with quiet():
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=checkpoint.vae,
            text_encoder=checkpoint.text_encoder,
            tokenizer=checkpoint.tokenizer,
            unet=checkpoint.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        result = pipeline(
            list(prompts),
            latents=torch.from_numpy(latents),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
        )
    return [np.asarray(image) for image in result.images]


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in decibels, at most 100."""
    mean_square = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return MOST_PSNR_DB if mean_square == 0 else min(MOST_PSNR_DB, 10 * float(np.log10(255**2 / mean_square)))
