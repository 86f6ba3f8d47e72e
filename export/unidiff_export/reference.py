"""What PyTorch computes for the samples of an export: the reference for verification and calibration.

diffusers' own pipeline generates images of the captions, so the UNet is called with the latents of a real sampler at
every noise level, with and without a prompt. These calls and the images, or real images where the samples have some,
give the inputs of all graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from unidiff_sdk.training.data.captions import normalize_caption, tokenize
from unidiff_sdk.training.data.pairs import load_pairs

from .bundle.files import clip_tokenizer
from .graphs.lowering import GraphSpec, quiet

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

Inputs = tuple[Tensor, ...]
ImageArray = NDArray[np.uint8]

# The captions if a checkpoint records none.
PROMPTS = ("a red dress", "blue striped boots")
# UNets with more parameters generate fewer images, so that verifying Stable Diffusion takes minutes on two cores.
LARGE = 100_000_000


@dataclass(frozen=True)
class Workload:
    """How much an export generates and searches.

    Attributes:
        images: images generated for verification.
        calibration_images: images generated to calibrate int8.
        steps: denoising steps, or None for the bundle's default.
        pairs: largest number of pairs for search.
        latent_side: latent positions along one side of the images for verification.
    """

    images: int
    calibration_images: int
    steps: int | None
    pairs: int
    latent_side: int


def workload_for(checkpoint: Checkpoint, precision: str) -> Workload:
    """Return the workload that a model's size allows in a few minutes on two cores.

    For a large model in fp32, images have half the native side. Lower precisions fail when values grow too large, which
    depends on the side, so they keep it. `verification.random_calls` compares the fp32 UNet at its native size.
    """
    config = checkpoint.unet.config
    native, half = config.sample_size, config.sample_size // 2
    if checkpoint.unet.num_parameters() <= LARGE:
        return Workload(images=16, calibration_images=16, steps=None, pairs=200, latent_side=native)
    halved = precision == "fp32" and half % 2 ** (len(config.block_out_channels) - 1) == 0
    return Workload(images=1, calibration_images=2, steps=5, pairs=64, latent_side=half if halved else native)


# --- samples ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Captions with distinct meanings, and optionally their images: uint8[side, side, 3], preprocessed for CLIP."""

    captions: tuple[str, ...]
    images: tuple[ImageArray, ...] | None = None

    def split(self, calibration: int) -> tuple[Samples, Samples]:
        """Return samples for verification and for calibration: at most `calibration` of the latter, at most half."""
        first = min(calibration, len(self.captions) // 2)
        images = self.images
        verification = Samples(self.captions[first:], images and images[first:])
        return verification, Samples(self.captions[:first], images and images[:first])


def read_samples(
    checkpoint: Checkpoint, data: str | Path | None, limit: int, *, default: tuple[str, ...] = PROMPTS
) -> Samples:
    """Return the pairs of the catalog `data`, or without one the captions that the checkpoint records, or `default`.

    Raises:
        DataError: `data` is not a catalog.
    """
    if data is None:
        return Samples(_distinct(tuple(checkpoint.meta.get("captions", ())) or default))
    pairs = load_pairs(data, checkpoint, limit=limit)
    captions = _distinct(pairs.captions)
    indices = torch.tensor([pairs.captions.index(caption) for caption in captions])
    return Samples(captions, tuple(pairs.clip_images[indices].permute(0, 2, 3, 1).numpy()))


def _distinct(captions: Sequence[str]) -> tuple[str, ...]:
    """Return the first of all captions that are equal after normalization."""
    first: dict[str, str] = {}
    for caption in captions:
        first.setdefault(normalize_caption(caption), caption)
    return tuple(first.values())


# --- generation with diffusers ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GeneratedImages:
    """Images that diffusers' pipeline generated in float32 PyTorch, and the values on the way.

    Attributes:
        prompts: one for each image.
        noise: the initial latents, float32[n, channels, height, width].
        latents: the final latents, as the VAE decoder takes them.
        images: uint8[height, width, 3] for each prompt.
        unet_inputs: the UNet's inputs at each step.
    """

    prompts: tuple[str, ...]
    noise: NDArray[np.float32]
    latents: Tensor
    images: tuple[ImageArray, ...]
    unet_inputs: tuple[Inputs, ...]


def generate_images(
    checkpoint: Checkpoint,
    scheduler: SchedulerMixin,
    prompts: Sequence[str],
    *,
    side: int,
    seed: int,
    steps: int,
    guidance_scale: float,
) -> GeneratedImages:
    """Generate one image of each prompt with diffusers' StableDiffusionPipeline, from `side` x `side` latents."""
    shape = (len(prompts), checkpoint.unet.config.in_channels, side, side)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    calls: list[Inputs] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, timestep = args
        calls.append((sample, timestep.float().reshape(-1).expand(len(sample)), kwargs["encoder_hidden_states"]))

    with quiet():
        pipeline = _pipeline(checkpoint, scheduler)
        handle = checkpoint.unet.register_forward_pre_hook(record, with_kwargs=True)
        try:
            latents = pipeline(
                list(prompts),
                latents=torch.from_numpy(noise),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images
        finally:
            handle.remove()
        latents = latents / checkpoint.vae.config.scaling_factor + (checkpoint.vae.config.shift_factor or 0)
        with torch.no_grad():
            decoded = checkpoint.vae.decode(latents).sample
        images = pipeline.image_processor.postprocess(decoded, output_type="pil")
    return GeneratedImages(tuple(prompts), noise, latents, tuple(map(np.asarray, images)), tuple(calls))


def _pipeline(checkpoint: Checkpoint, scheduler: SchedulerMixin) -> Any:
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
    return pipeline


def reference_scheduler(sampler: str, checkpoint: Checkpoint) -> tuple[SchedulerMixin, str]:
    """Return diffusers' scheduler for our sampler, and the sampler's name; DDIM for samplers that add fresh noise."""
    import diffusers

    # The bundle records the whole configuration, including the defaults of the checkpoint's own scheduler class.
    # from_config of another class would drop those.
    config = {key: value for key, value in checkpoint.scheduler.config.items() if key != "_use_default_values"}
    if sampler in ("euler", "euler_karras"):
        karras = sampler.endswith("karras")
        return diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=karras), sampler
    if sampler in ("dpm++2m", "dpm++2m_karras"):
        karras = sampler.endswith("karras")
        return diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=karras), sampler
    return diffusers.DDIMScheduler.from_config(config), "ddim"


# --- the reference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The results of PyTorch that a bundle is compared with.

    Attributes:
        generated: images, and the latents that they started from.
        sampler, steps, guidance_scale: how they were generated.
        searched: the pairs for search.
        embeddings: unit embeddings of their captions and of their images.
        agreement: mean cosine of the generated images and their prompts.
        inputs: the inputs of each graph in all of this.
    """

    generated: GeneratedImages
    sampler: str
    steps: int
    guidance_scale: float
    searched: Samples
    embeddings: tuple[NDArray[np.float32], NDArray[np.float32]]
    agreement: float
    inputs: dict[str, tuple[Inputs, ...]]

    def observed_calls(self, graph: str) -> tuple[Inputs, ...]:
        """Return the first, the middle and the last inputs of a graph."""
        calls = self.inputs[graph]
        return tuple(calls[i] for i in sorted({0, len(calls) // 2, len(calls) - 1}))


def make_reference(
    checkpoint: Checkpoint,
    specs: Sequence[GraphSpec],
    samples: Samples,
    workload: Workload,
    sampler_defaults: dict[str, Any],
) -> Reference:
    """Generate images of the captions of `samples`, and embed its pairs (the generated images if it has none)."""
    scheduler, sampler = reference_scheduler(sampler_defaults["name"], checkpoint)
    steps = min(workload.steps or sampler_defaults["steps"], sampler_defaults["steps"])
    guidance = sampler_defaults["guidance_scale"]
    prompts = samples.captions[: workload.images]
    generated = generate_images(
        checkpoint, scheduler, prompts, side=workload.latent_side, seed=0, steps=steps, guidance_scale=guidance
    )
    searched = samples if samples.images else Samples(prompts, generated.images)
    texts, images = _embed(checkpoint, specs, prompts, generated.images)
    embeddings = _embed(checkpoint, specs, searched.captions, samples.images) if samples.images else (texts, images)
    return Reference(
        generated=generated,
        sampler=sampler,
        steps=steps,
        guidance_scale=guidance,
        searched=searched,
        embeddings=embeddings,
        agreement=float((texts * images).sum(axis=1).mean()),
        inputs=graph_inputs(checkpoint, generated, searched.captions, samples.images or generated.images),
    )


def _embed(
    checkpoint: Checkpoint, specs: Sequence[GraphSpec], captions: Sequence[str], images: Sequence[ImageArray]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return unit embeddings of captions and images, by the PyTorch modules behind the graphs."""
    modules = {spec.name: spec.module for spec in specs}
    with torch.no_grad():
        if checkpoint.shared:
            _, texts = modules["text_encoder"](tokenize(checkpoint.tokenizer, captions))
        else:
            texts = modules["clip_text_encoder"](tokenize(clip_tokenizer(checkpoint), captions))
        pixels = checkpoint.image_processor(list(images), return_tensors="pt").pixel_values
        return _unit(texts), _unit(modules["image_encoder"](pixels))


def _unit(embeddings: Tensor) -> NDArray[np.float32]:
    return torch.nn.functional.normalize(embeddings, dim=-1).numpy()


def graph_inputs(
    checkpoint: Checkpoint, generated: GeneratedImages, captions: Sequence[str], images: Sequence[ImageArray]
) -> dict[str, tuple[Inputs, ...]]:
    """Return the inputs of each graph when it generates `generated` and embeds `captions` and `images`.

    images: uint8[height, width, 3] each, all of the same size.
    """
    pixels = torch.from_numpy(np.stack(generated.images)).permute(0, 3, 1, 2).float() / 255
    normalized = checkpoint.image_processor(list(images), return_tensors="pt").pixel_values
    search = {} if checkpoint.shared else {"clip_text_encoder": ((tokenize(clip_tokenizer(checkpoint), captions),),)}
    return search | {
        "text_encoder": ((tokenize(checkpoint.tokenizer, captions),),),
        "unet": generated.unet_inputs,
        "vae_decoder": ((generated.latents,),),
        "vae_encoder": ((pixels * 2 - 1,),),
        "image_encoder": ((normalized,),),
    }
