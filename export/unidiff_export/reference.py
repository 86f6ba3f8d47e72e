"""What PyTorch computes for the samples of an export: the reference for verification and calibration.

diffusers' own pipeline generates images of the captions, so the UNet is called with the latents of a real sampler at
every noise level, with and without a prompt. These calls and the images, or real images where the samples have some,
give the inputs of all graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from unidiff_sdk.training.checkpoints.loading.second_text_encoder import THIRD_TOKENS
from unidiff_sdk.training.data.captions import normalize_caption, tokenize
from unidiff_sdk.training.data.pairs import load_pairs
from unidiff_sdk.training.runtime.allocator import return_freed_memory

from .bundle.files import clip_tokenizer
from .graphs.lowering import GraphSpec
from .pipeline import (
    GeneratedImages,
    ImageArray,
    Inputs,
    ReferenceEmbeddings,
    embed_odd_inputs,
    generate_images,
    load_pipeline,
    unit,
)

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

# The captions if a checkpoint records none.
PROMPTS = ("a red dress", "blue striped boots")
# What guidance leads away from in the comparison of images, so that a negative prompt is compared as well.
NEGATIVE_PROMPT = "a blurry photo"
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
    block = config.patch_size if checkpoint.is_transformer else 2 ** (len(config.block_out_channels) - 1)
    halved = precision == "fp32" and half % block == 0
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
    checkpoint: Checkpoint,
    data: str | Path | None,
    limit: int,
    *,
    columns: Mapping[str, str | None] | None = None,
    default: tuple[str, ...] = PROMPTS,
) -> Samples:
    """Return the pairs of the catalog `data`, or without one the captions that the checkpoint records, or `default`.

    Raises:
        DataError: `data` is not a catalog.
    """
    if data is None:
        return Samples(distinct(tuple(checkpoint.meta.get("captions", ())) or default))
    pairs = load_pairs(data, checkpoint, columns=columns, limit=limit)
    captions = distinct(pairs.captions)
    indices = torch.tensor([pairs.captions.index(caption) for caption in captions])
    return Samples(captions, tuple(pairs.clip_images[indices].permute(0, 2, 3, 1).numpy()))


def distinct(captions: Sequence[str]) -> tuple[str, ...]:
    """Return the first of all captions that are equal after normalization."""
    first: dict[str, str] = {}
    for caption in captions:
        first.setdefault(normalize_caption(caption), caption)
    return tuple(first.values())


# --- the reference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SearchReference:
    """The results of PyTorch that the encoders of a bundle are compared with.

    Attributes:
        searched: the pairs for search; None without data.
        embeddings: unit embeddings of their captions and of their images.
        odd: unit embeddings of unusual texts and images.
        inputs: the inputs of each graph in all of this.
    """

    searched: Samples | None
    embeddings: tuple[NDArray[np.float32], NDArray[np.float32]] | None
    odd: ReferenceEmbeddings
    inputs: dict[str, tuple[Inputs, ...]]

    def observed_calls(self, graph: str) -> tuple[Inputs, ...]:
        """Return the first, the middle and the last inputs of a graph."""
        calls = self.inputs[graph]
        return tuple(calls[i] for i in sorted({0, len(calls) // 2, len(calls) - 1}))


@dataclass(frozen=True, kw_only=True)
class Reference(SearchReference):
    """The results of PyTorch that a bundle with a generator is compared with.

    Attributes:
        generated: images, and the latents that they started from.
        sampler, steps, guidance_scale: how they were generated.
        agreement: mean cosine of the generated images and their prompts.
    """

    generated: GeneratedImages
    sampler: str
    steps: int
    guidance_scale: float
    agreement: float


def make_reference(
    checkpoint: Checkpoint,
    specs: Sequence[GraphSpec],
    samples: Samples,
    workload: Workload,
    sampler_defaults: dict[str, Any],
    from_disk: bool = True,
) -> Reference:
    """Generate images of the captions of `samples`, and embed its pairs (the generated images if it has none).

    Images, and the embeddings of unusual inputs, are those of diffusers and transformers with the checkpoint's folders,
    or with the models in memory unless `from_disk`. The weights loaded for it are released on return.
    """
    return_freed_memory()  # of loading the checkpoint, whose weights are loaded again
    pipeline = load_pipeline(checkpoint, sampler_defaults["name"], checkpoint.path if from_disk else None)
    steps = min(workload.steps or sampler_defaults["steps"], sampler_defaults["steps"])
    guidance = sampler_defaults["guidance_scale"]
    prompts = with_added_tokens(checkpoint.tokenizer, samples.captions[: workload.images])
    generated = generate_images(
        pipeline,
        prompts,
        side=workload.latent_side,
        seed=0,
        steps=steps,
        guidance_scale=guidance,
        negative_prompt=NEGATIVE_PROMPT if guidance > 1 else "",
    )
    del pipeline
    return_freed_memory()  # CLIP is loaded next
    searched = samples if samples.images else Samples(prompts, generated.images)
    texts, images = _embed(checkpoint, specs, prompts, generated.images)
    embeddings = _embed(checkpoint, specs, searched.captions, samples.images) if samples.images else (texts, images)
    odd = embed_odd_inputs(checkpoint, checkpoint.clip_path if from_disk else None)
    return_freed_memory()
    return Reference(
        generated=generated,
        sampler=sampler_defaults["name"],
        steps=steps,
        guidance_scale=guidance,
        searched=searched,
        embeddings=embeddings,
        odd=odd,
        agreement=float((texts * images).sum(axis=1).mean()),
        inputs=graph_inputs(checkpoint, generated, searched.captions, samples.images or generated.images),
    )


def with_added_tokens(tokenizer: Any, prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Put the tokens that were added to a tokenizer, by textual inversion, at the start of the first prompt."""
    added = set(tokenizer.added_tokens_encoder) - set(tokenizer.all_special_tokens)
    tokens = [token for token in added if not any(token.startswith(f"{other}_") for other in added)]
    return (" ".join([*sorted(tokens), prompts[0]]), *prompts[1:]) if tokens else prompts


def _embed(
    checkpoint: Checkpoint, specs: Sequence[GraphSpec], captions: Sequence[str], images: Sequence[ImageArray]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return unit embeddings of captions and images, by the PyTorch modules behind the graphs."""
    modules = {spec.name: spec.module for spec in specs}
    with torch.no_grad():
        if checkpoint.shared:
            outputs = next(spec.outputs for spec in specs if spec.name == "text_encoder")
            results = modules["text_encoder"](tokenize(checkpoint.tokenizer, captions))
            texts = results[outputs.index("text_embeds")]
        else:
            texts = modules["clip_text_encoder"](tokenize(clip_tokenizer(checkpoint), captions))
        pixels = checkpoint.image_processor(list(images), return_tensors="pt").pixel_values
        return unit(texts), unit(modules["image_encoder"](pixels))


def graph_inputs(
    checkpoint: Checkpoint, generated: GeneratedImages, captions: Sequence[str], images: Sequence[ImageArray]
) -> dict[str, tuple[Inputs, ...]]:
    """Return the inputs of each graph when it generates `generated` and embeds `captions` and `images`.

    images: uint8[height, width, 3] each, all of the same size.
    """
    pixels = torch.from_numpy(np.stack(generated.images)).permute(0, 3, 1, 2).float() / 255
    normalized = checkpoint.image_processor(list(images), return_tensors="pt").pixel_values
    tokenizers = {} if checkpoint.shared else {"clip_text_encoder": clip_tokenizer(checkpoint)}
    if checkpoint.second is not None:
        tokenizers["text_encoder_2"] = checkpoint.second.tokenizer
    third = {}
    if checkpoint.third is not None:
        third["text_encoder_3"] = ((tokenize(checkpoint.third.tokenizer, captions, THIRD_TOKENS),),)
    return (
        third
        | {graph: ((tokenize(tokenizer, captions),),) for graph, tokenizer in tokenizers.items()}
        | {
            "text_encoder": ((tokenize(checkpoint.tokenizer, captions),),),
            checkpoint.denoiser: generated.denoiser_inputs,
            "vae_decoder": ((generated.latents,),),
            "vae_encoder": ((pixels * 2 - 1,),),
            "image_encoder": ((normalized,),),
        }
    )
