"""The evidence that a bundle carries: its graphs, its pictures and its search beside PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unidiff_sdk.errors import ExportError, GenerationError
from unidiff_sdk.training.data.captions import normalize_caption, tokenize
from unidiff_sdk.training.evaluation.retrieval import retrieval_figures

from .bundle_folder import clip_tokenizer
from .graphs.lowering import GraphSpec
from .quantization.calibration import Drawing, Effort, Inputs, Samples, draw, inputs_of

if TYPE_CHECKING:
    from diffusers import SchedulerMixin
    from numpy.typing import NDArray

    from unidiff_sdk.inference.bundle import Bundle
    from unidiff_sdk.inference.sessions import Session
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

# Of equal pictures the ratio is infinite, which JSON cannot say.
MOST_PSNR_DB = 100.0
# A picture whose brightest level is below this, of 255, is black.
BLACK = 8
# Mean text-image agreement may change by so much, relative; R@1 may fall by so much.
AGREEMENT_TOLERANCE, RECALL_TOLERANCE = 0.02, 0.005
# An untrained model agrees with nothing: below this cosine the change is taken relative to it.
LEAST_AGREEMENT = 0.1
GENERATION = ("unet", "vae_decoder", "text_encoder")
SEARCH = ("text_encoder", "clip_text_encoder", "image_encoder")


@dataclass(frozen=True)
class Tolerance:
    """How far a bundle of one precision may be from PyTorch, and what to try where it is further.

    max_abs_error is None where single values may be far off while the whole is right.
    """

    max_abs_error: float | None
    cosine: float
    image_psnr_db: float
    advice: str


TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.99999, 45.0, "install the package versions of constraints.txt"),
    "fp16": Tolerance(5e-2, 0.999, 35.0, "half precision is too coarse for this model: try --fp32"),
    "int8": Tolerance(
        None,
        0.98,
        25.0,
        "8 bits are too coarse for what this model computes: calibrate on more of your own products "
        "(--calibration DATA), or try --fp16 or --fp32",
    ),
}


class ToleranceError(ExportError):
    """A result is too far from PyTorch's. `graphs`: those that it came through."""

    def __init__(self, message: str, graphs: Sequence[str]) -> None:
        super().__init__(message)
        self.graphs = tuple(graphs)


@dataclass(frozen=True)
class GraphParity:
    """One graph against its PyTorch module: over all outputs and inputs tried, the worst figures and their limits."""

    max_abs_error: float
    cosine: float
    tolerance: float | None
    least_cosine: float


@dataclass(frozen=True)
class ImageParity:
    """Whole pictures of the runtime against those of diffusers' pipeline, from the same latents.

    psnr_db is the worst picture's. agreement: mean cosine of a picture and its prompt, in the runtime and in PyTorch,
    each of its own pictures by its own encoders. resolution: pixels along a side.
    """

    psnr_db: float
    tolerance_db: float
    agreement: float
    reference_agreement: float
    pictures: int
    steps: int
    resolution: int


@dataclass(frozen=True)
class SearchParity:
    """R@1, the mean of both ways, of the runtime's encoders and of PyTorch's over the same pairs."""

    recall_at_1: float
    reference_recall_at_1: float
    pairs: int


@dataclass(frozen=True)
class Reference:
    """What PyTorch draws and finds.

    Attributes:
        drawing: its pictures, and what they started from.
        sampler, steps, guidance_scale: how.
        searched: the pairs that are looked up.
        embeddings: of their captions and of their pictures, unit rows.
        agreement: mean cosine of its pictures and their prompts.
        inputs: what each graph is called with in all this.
    """

    drawing: Drawing
    sampler: str
    steps: int
    guidance_scale: float
    searched: Samples
    embeddings: tuple[NDArray[np.float32], NDArray[np.float32]]
    agreement: float
    inputs: dict[str, tuple[Inputs, ...]]


def make_reference(
    checkpoint: Checkpoint, specs: Sequence[GraphSpec], samples: Samples, effort: Effort, defaults: dict
) -> Reference:
    """Draw captions of `samples` with diffusers, and look up its pairs (what was drawn, if it has no pictures)."""
    scheduler, sampler = reference_scheduler(defaults["name"], checkpoint)
    steps = min(effort.steps or defaults["steps"], defaults["steps"])
    prompts = samples.captions[: effort.pictures]
    guidance = defaults["guidance_scale"]
    drawing = draw(checkpoint, scheduler, prompts, side=effort.side, seed=0, steps=steps, guidance_scale=guidance)
    pictures = samples.pictures or drawing.pictures
    searched = Samples(samples.captions if samples.pictures else prompts, pictures)
    modules = {spec.name: spec.module for spec in specs}
    if checkpoint.shared:
        text_encoder, tokenizer = modules["text_encoder"], checkpoint.tokenizer
    else:
        text_encoder, tokenizer = modules["clip_text_encoder"], clip_tokenizer(checkpoint)

    def embed(captions: Sequence[str], pictures: Sequence[NDArray[np.uint8]]) -> tuple[NDArray, NDArray]:
        with torch.no_grad():
            pixels = checkpoint.image_processor(list(pictures), return_tensors="pt").pixel_values
            texts, images = text_encoder(tokenize(tokenizer, captions)), modules["image_encoder"](pixels)
        return _unit(texts[-1] if checkpoint.shared else texts), _unit(images)

    texts, images = embed(prompts, drawing.pictures)
    embeddings = embed(searched.captions, pictures) if samples.pictures else (texts, images)
    inputs = inputs_of(checkpoint, drawing, searched.captions, pictures)
    agreement = float((texts * images).sum(axis=1).mean())
    return Reference(drawing, sampler, steps, guidance, searched, embeddings, agreement, inputs)


def _unit(rows: Tensor) -> NDArray[np.float32]:
    return torch.nn.functional.normalize(rows, dim=-1).numpy()


def calls_of(spec: GraphSpec, precision: str, reference: Reference) -> tuple[Inputs, ...]:
    """What a graph is compared on: random inputs.

    For int8, which is right only for values that occur, what the graph sees in the reference.
    """
    return seen_calls(spec, reference) if precision == "int8" else random_calls(spec)


def seen_calls(spec: GraphSpec, reference: Reference) -> tuple[Inputs, ...]:
    """The first, a middle and the last of what a graph is called with in the reference."""
    calls = reference.inputs[spec.name]
    return tuple(calls[i] for i in sorted({0, len(calls) // 2, len(calls) - 1}))


def random_calls(spec: GraphSpec) -> tuple[Inputs, ...]:
    """Random inputs of two shapes, neither of them that of the tracing.

    Those of a UNet made for larger latents than these are joined by as many positions as it was made for.
    """
    calls = [spec.example(batch, scale) for batch, scale in ((3, 1), (1, 2))]
    if spec.name == "unet" and (times := spec.usual["height"] // calls[0][0].shape[-1]) > 1:
        calls.append(spec.example(1, times**2))
    return tuple(calls)


def compare_graph(
    session: Session, spec: GraphSpec, tolerance: Tolerance, calls: Sequence[Inputs] | None = None
) -> GraphParity:
    """Run `spec`'s module and its graph on the same inputs, by default random ones.

    Raises ToleranceError where the graph's result lies outside `tolerance`, ExportError where it has another shape or
    is not finite.
    """
    errors, cosines = [], []
    for inputs in calls or random_calls(spec):
        with torch.no_grad():
            expected = spec.module(*inputs)
        outputs = session.run(dict(zip(spec.inputs, (x.numpy() for x in inputs), strict=True)))
        references = expected if isinstance(expected, tuple) else (expected,)
        for name, reference in zip(spec.outputs, references, strict=True):
            errors.append(max_abs_error(f"{spec.name}'s {name}", outputs[name], reference.numpy()))
            cosines.append(cosine(outputs[name], reference.numpy()))
    parity = GraphParity(max(errors), min(cosines), tolerance.max_abs_error, tolerance.cosine)
    if parity.tolerance is not None and parity.max_abs_error > parity.tolerance:
        raise ToleranceError(
            f"{spec.name} differs from PyTorch by up to {parity.max_abs_error:.2g} (allowed: {parity.tolerance:.0e}); "
            + tolerance.advice,
            [spec.name],
        )
    if parity.cosine < parity.least_cosine:
        raise ToleranceError(
            f"{spec.name} points elsewhere than PyTorch: their cosine is {parity.cosine:.4f} (at least "
            f"{parity.least_cosine} asked); {tolerance.advice}",
            [spec.name],
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


def compare_images(bundle: Bundle, reference: Reference, tolerance: Tolerance) -> ImageParity:
    """Draw with our runtime what diffusers drew, from the same latents, and compare.

    Raises ToleranceError where a picture is too far from diffusers' or agrees less with its prompt, ExportError where
    one is black or not finite.
    """
    from unidiff_sdk.generation.generator import Generator
    from unidiff_sdk.inference.encoder import Encoder

    drawing = reference.drawing
    height, width, _ = drawing.pictures[0].shape
    try:
        ours = Generator(bundle).generate(
            drawing.prompts,
            sampler=reference.sampler,
            latents=drawing.noise,
            width=width,
            height=height,
            steps=reference.steps,
            guidance_scale=reference.guidance_scale,
        )
    except GenerationError as error:
        raise ExportError(f"the bundle cannot draw: {error} (where a number overflowed, try --fp32)") from error
    for prompt, image in zip(drawing.prompts, ours, strict=True):
        if np.asarray(image).max() < BLACK:
            raise ExportError(f"the picture of {prompt!r} is black; try --fp32, or look at what the checkpoint draws")
    encoder = Encoder(bundle)
    agreement = (encoder.encode_texts(drawing.prompts) * encoder.encode_images(ours)).sum(axis=1).mean()
    parity = ImageParity(
        psnr_db=min(map(psnr_db, map(np.asarray, ours), drawing.pictures)),
        tolerance_db=tolerance.image_psnr_db,
        agreement=float(agreement),
        reference_agreement=reference.agreement,
        pictures=len(ours),
        steps=reference.steps,
        resolution=height,
    )
    if parity.psnr_db < parity.tolerance_db:
        raise ToleranceError(
            f"pictures are only {parity.psnr_db:.1f} dB PSNR from those of diffusers with the same latents "
            f"(at least {parity.tolerance_db:.0f} dB asked); {tolerance.advice}",
            GENERATION,
        )
    allowed = AGREEMENT_TOLERANCE * max(abs(reference.agreement), LEAST_AGREEMENT)
    if abs(parity.agreement - reference.agreement) > allowed:
        raise ToleranceError(
            f"pictures agree with their prompts by {parity.agreement:.3f} on average, PyTorch's by "
            f"{reference.agreement:.3f} (within {AGREEMENT_TOLERANCE:.0%} asked); {tolerance.advice}",
            [*GENERATION, *SEARCH],
        )
    return parity


def compare_search(bundle: Bundle, reference: Reference, tolerance: Tolerance) -> SearchParity:
    """Look up the reference's pairs with the bundle's encoders.

    Raises ToleranceError where R@1 falls by more than 0.5 points, or by more than one query where there are so few.
    """
    from unidiff_sdk.inference.encoder import Encoder

    encoder, pairs = Encoder(bundle), reference.searched
    assert pairs.pictures is not None  # those of a reference always have some
    ours = encoder.encode_texts(pairs.captions), encoder.encode_images(pairs.pictures)
    recall, expected = (recall_at_1(*embeddings, pairs.captions) for embeddings in (ours, reference.embeddings))
    if expected - recall > max(RECALL_TOLERANCE, 0.5 / len(pairs.captions)) + 1e-9:
        raise ToleranceError(
            f"R@1 over {len(pairs.captions)} pairs is {recall:.1%}, but PyTorch's is {expected:.1%} (within "
            f"{RECALL_TOLERANCE:.1%} asked); {tolerance.advice}",
            SEARCH,
        )
    return SearchParity(recall, expected, len(pairs.captions))


def recall_at_1(texts: NDArray[np.float32], images: NDArray[np.float32], captions: Sequence[str]) -> float:
    """The mean of both ways; pairs whose captions say the same are all right answers."""
    ways = retrieval_figures(images, texts, [(normalize_caption(caption),) for caption in captions])
    return float(np.mean([way["R@1"] for way in ways.values()]))


def reference_scheduler(sampler: str, checkpoint: Checkpoint) -> tuple[SchedulerMixin, str]:
    """diffusers' scheduler for our sampler of that name, and the name; DDIM for those that draw fresh noise."""
    import diffusers

    # The bundle says all of it, also what the checkpoint's file leaves to its own scheduler's defaults; from_config of
    # another scheduler would drop that.
    config = {key: value for key, value in checkpoint.scheduler.config.items() if key != "_use_default_values"}
    if sampler in ("euler", "euler_karras"):
        karras = sampler.endswith("karras")
        return diffusers.EulerDiscreteScheduler.from_config(config, use_karras_sigmas=karras), sampler
    if sampler in ("dpm++2m", "dpm++2m_karras"):
        karras = sampler.endswith("karras")
        return diffusers.DPMSolverMultistepScheduler.from_config(config, use_karras_sigmas=karras), sampler
    return diffusers.DDIMScheduler.from_config(config), "ddim"


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of two 8-bit pictures in decibels, at most 100."""
    mean_square = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return MOST_PSNR_DB if mean_square == 0 else min(MOST_PSNR_DB, 10 * float(np.log10(255**2 / mean_square)))
