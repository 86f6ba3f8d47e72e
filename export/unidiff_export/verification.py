"""Verification: compare a bundle's graphs, images and search with PyTorch, and refuse it outside the tolerance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from unidiff_sdk.errors import ExportError, GenerationError
from unidiff_sdk.training.data.captions import normalize_caption
from unidiff_sdk.training.evaluation.retrieval import retrieval_figures

from .graphs.lowering import GraphSpec
from .graphs.text_encoders import HIDDEN
from .pipeline import GeneratedImages, Inputs
from .reference import Reference, SearchReference

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

    from unidiff_sdk.inference.encoder import Encoder
    from unidiff_sdk.inference.sessions import Session

# The ratio of equal images is infinite, which JSON cannot represent.
MAX_PSNR_DB = 100.0
# An image whose brightest value, of 255, is below this is black.
BLACK = 8
# Largest relative change of the mean text-image agreement, and largest decrease of R@1.
AGREEMENT_TOLERANCE, RECALL_TOLERANCE = 0.02, 0.005
# Smallest cosine of an embedding and that of transformers, at any precision that is not coarser: other backends of
# transformers' preprocessing round pixels to 8 bits in another way.
EMBEDDING_COSINE = 0.9999
# The agreement of an untrained model is close to zero. Below this cosine, the change is relative to this value.
MIN_AGREEMENT = 0.1
GENERATION_GRAPHS = ("unet", "transformer", "vae_decoder", "text_encoder")
SEARCH_GRAPHS = ("text_encoder", "clip_text_encoder", "image_encoder")

Generate = Callable[..., Sequence["Image.Image"]]


@dataclass(frozen=True)
class Tolerance:
    """How far a bundle may deviate from PyTorch.

    Attributes:
        max_abs_error: largest error of a single output value; None if single values may deviate.
        cosine: smallest cosine between an output of a graph and PyTorch's.
        image_psnr_db: smallest PSNR of an image.
        advice: what to do if the deviation is larger.
    """

    max_abs_error: float | None
    cosine: float
    image_psnr_db: float
    advice: str


TOLERANCES = {
    "fp32": Tolerance(1e-4, 0.99999, 45.0, "Install the package versions of constraints.txt."),
    "fp16": Tolerance(5e-2, 0.999, 35.0, "Half precision is too coarse for this model. Use --fp32."),
    "int8": Tolerance(
        None,
        0.98,
        25.0,
        "8 bits are too coarse for this model. Calibrate on more of your own products (--calibration DATA), or use "
        "--fp16 or --fp32.",
    ),
}


class ToleranceError(ExportError):
    """A result deviates too far from PyTorch. `graphs`: the graphs that computed it."""

    def __init__(self, message: str, graphs: Sequence[str]) -> None:
        super().__init__(message)
        self.graphs = tuple(graphs)


@dataclass(frozen=True)
class GraphParity:
    """The largest error and the smallest cosine of a graph, over all outputs and calls, with their limits."""

    max_abs_error: float
    cosine: float
    tolerance: float | None
    min_cosine: float


@dataclass(frozen=True)
class ImageParity:
    """Images of the runtime compared with images of diffusers' pipeline from the same latents.

    Attributes:
        psnr_db: PSNR of the worst image.
        tolerance_db: its limit.
        agreement, reference_agreement: mean cosine of the images and their prompts, in the runtime and in PyTorch, each
            with its own images and encoders.
        images: number of images.
        steps: denoising steps.
        resolution: pixels along one side.
    """

    psnr_db: float
    tolerance_db: float
    agreement: float
    reference_agreement: float
    images: int
    steps: int
    resolution: int


@dataclass(frozen=True)
class SearchParity:
    """R@1, the mean of both directions, of the runtime's and of PyTorch's encoders over the same pairs."""

    recall_at_1: float
    reference_recall_at_1: float
    pairs: int


@dataclass(frozen=True)
class EmbeddingParity:
    """Embeddings of unusual texts and images, compared with CLIPModel and CLIPProcessor of transformers.

    Attributes:
        text_cosine, image_cosine: the smallest cosine of an embedding and its reference.
        min_cosine: its limit.
        texts, images: number of texts and of images.
    """

    text_cosine: float
    image_cosine: float
    min_cosine: float
    texts: int
    images: int


@dataclass(frozen=True)
class Evidence:
    """The results of a verification that passed.

    Attributes:
        graphs: by name.
        image: generated images; None without a generator.
        search: text and image search; None without pairs to search.
        embeddings: embeddings of unusual texts and images.
        loras: PSNR of the worst image with each switchable LoRA, by name.
        devices: images, search and embeddings on further devices, by name, as in the manifest.
    """

    graphs: dict[str, GraphParity]
    image: ImageParity | None
    search: SearchParity | None
    embeddings: EmbeddingParity
    loras: dict[str, float] = field(default_factory=dict)
    devices: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the parity report of the manifest."""
        graphs = {name: asdict(parity) for name, parity in self.graphs.items()}
        return graphs | results_to_json(self.image, self.search, self.embeddings) | self.devices


def results_to_json(
    image: ImageParity | None, search: SearchParity | None, embeddings: EmbeddingParity
) -> dict[str, Any]:
    """Return the comparisons of whole results as the manifest lists them."""
    results = {"image": image, "search": search, "embeddings": embeddings}
    return {name: asdict(parity) for name, parity in results.items() if parity is not None}


# --- graphs ----------------------------------------------------------------------------------------------------------


def calls_for(spec: GraphSpec, precision: str, reference: SearchReference) -> tuple[Inputs, ...]:
    """Return the inputs that a graph is compared on: random ones, or for int8 those that occur in the reference.

    int8 is accurate only for values within the calibrated ranges.
    """
    return reference.observed_calls(spec.name) if precision == "int8" else random_calls(spec)


def random_calls(spec: GraphSpec) -> tuple[Inputs, ...]:
    """Return random inputs of two shapes that differ from the shape of tracing.

    A denoiser whose native latents are larger is also called with its native number of positions.
    """
    calls = [spec.example(batch, scale) for batch, scale in ((3, 1), (1, 2))]
    if spec.denoises and (times := spec.typical_sizes["height"] // calls[0][0].shape[-1]) > 1:
        calls.append(spec.example(1, times**2))
    return tuple(calls)


@dataclass(frozen=True)
class ExpectedOutputs:
    """What the module of a graph computes in PyTorch. It takes little memory, so the module can be released.

    Attributes:
        calls: the inputs of each call.
        outputs: the outputs of each call, in the order of `GraphSpec.outputs`.
    """

    calls: tuple[Inputs, ...]
    outputs: tuple[tuple[NDArray[np.float32], ...], ...]


def expected_outputs(spec: GraphSpec, calls: Sequence[Inputs] | None = None) -> ExpectedOutputs:
    """Run the module of a graph on `calls`, by default on random ones."""
    calls, results = tuple(calls or random_calls(spec)), []
    with torch.no_grad():
        for inputs in calls:
            outputs = spec.module(*inputs)
            results.append(tuple(each.numpy() for each in (outputs if isinstance(outputs, tuple) else (outputs,))))
    return ExpectedOutputs(calls, tuple(results))


def compare_graph(session: Session, spec: GraphSpec, tolerance: Tolerance, expected: ExpectedOutputs) -> GraphParity:
    """Run a graph on the inputs of `expected`, and compare its outputs with those of PyTorch.

    Errors of hidden states without a norm are relative to the largest value, as single values grow with each layer.

    Raises:
        ToleranceError: an output of the graph lies outside `tolerance`.
        ExportError: an output has another shape, or is not finite.
    """
    errors, cosines = [], []
    for inputs, references in zip(expected.calls, expected.outputs, strict=True):
        outputs = session.run(dict(zip(spec.inputs, (x.numpy() for x in inputs), strict=True)))
        for name, reference in zip(spec.outputs, references, strict=True):
            scale = max(1.0, float(np.abs(reference).max())) if name.startswith(HIDDEN) else 1.0
            errors.append(max_abs_error(f"{spec.name}: {name}", outputs[name], reference) / scale)
            cosines.append(cosine(outputs[name], reference))
    parity = GraphParity(max(errors), min(cosines), tolerance.max_abs_error, tolerance.cosine)
    if parity.tolerance is not None and parity.max_abs_error > parity.tolerance:
        raise ToleranceError(
            f"{spec.name} diverges from PyTorch: largest error {parity.max_abs_error:.2g}, allowed ≤ "
            f"{parity.tolerance:.0e}. {tolerance.advice}",
            [spec.name],
        )
    if parity.cosine < parity.min_cosine:
        raise ToleranceError(
            f"{spec.name} diverges from PyTorch: cosine {parity.cosine:.4f}, required ≥ {parity.min_cosine}. "
            f"{tolerance.advice}",
            [spec.name],
        )
    return parity


def max_abs_error(output: str, ours: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """Return the largest absolute difference.

    Raises:
        ExportError: shapes differ, or a value is not finite. The message names `output`.
    """
    if ours.shape != reference.shape:
        raise ExportError(f"{output} has shape {ours.shape}, but PyTorch's has shape {reference.shape}")
    if not np.isfinite(reference).all():
        raise ExportError(
            f"{output} is not finite in PyTorch either, so the checkpoint is broken. Export an earlier checkpoint, or "
            "train again."
        )
    if not np.isfinite(ours).all():
        raise ExportError(f"{output} is not finite, but PyTorch's is, because a value overflowed. Use --fp32.")
    return float(np.abs(ours - reference).max())


def cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Return the cosine of the angle between two flattened arrays."""
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), np.finfo(np.float64).tiny))


# --- images and search -----------------------------------------------------------------------------------------------


def compare_images(generate: Generate, encoder: Encoder, reference: Reference, tolerance: Tolerance) -> ImageParity:
    """Generate the reference's images from the same latents, and compare them.

    Args:
        generate: `Generator.generate` of the bundle.
        encoder: the bundle's encoder.
        reference: the images of diffusers.
        tolerance: the limits.

    Raises:
        ToleranceError: an image deviates too far, or the images agree less with their prompts.
        ExportError: an image is black or not finite.
    """
    expected = reference.generated
    images = generate_like(reference.generated, generate, reference)
    for prompt, image in zip(expected.prompts, images, strict=True):
        if np.asarray(image).max() < BLACK:
            raise ExportError(f"the image of {prompt!r} is black. Use --fp32, or check the images of the checkpoint.")
    agreement = (encoder.encode_texts(expected.prompts) * encoder.encode_images(images)).sum(axis=1).mean()
    parity = ImageParity(
        psnr_db=min(map(psnr_db, map(np.asarray, images), expected.images)),
        tolerance_db=tolerance.image_psnr_db,
        agreement=float(agreement),
        reference_agreement=reference.agreement,
        images=len(images),
        steps=reference.steps,
        resolution=expected.images[0].shape[0],
    )
    if parity.psnr_db < parity.tolerance_db:
        raise ToleranceError(
            f"generated images diverge from diffusers: PSNR {parity.psnr_db:.1f} dB, required ≥ "
            f"{parity.tolerance_db:.0f} dB. {tolerance.advice}",
            GENERATION_GRAPHS,
        )
    allowed = AGREEMENT_TOLERANCE * max(abs(reference.agreement), MIN_AGREEMENT)
    if abs(parity.agreement - reference.agreement) > allowed:
        raise ToleranceError(
            f"the agreement of images and prompts diverges from PyTorch: {parity.agreement:.3f} instead of "
            f"{reference.agreement:.3f}, allowed ± {AGREEMENT_TOLERANCE:.0%}. {tolerance.advice}",
            [*GENERATION_GRAPHS, *SEARCH_GRAPHS],
        )
    return parity


def generate_like(
    expected: GeneratedImages, generate: Generate, reference: Reference, **options: Any
) -> Sequence[Image.Image]:
    """Generate images from the prompts and latents of `expected`, with the settings of the reference and `options`.

    Raises:
        ExportError: the bundle cannot generate.
    """
    height, width, _ = expected.images[0].shape
    try:
        return generate(
            expected.prompts,
            negative_prompt=expected.negative_prompt,
            sampler=reference.sampler,
            latents=expected.noise,
            width=width,
            height=height,
            steps=reference.steps,
            guidance_scale=reference.guidance_scale,
            **options,
        )
    except GenerationError as error:
        raise ExportError(f"the bundle cannot generate images: {error}. If a value overflowed, use --fp32.") from error


def compare_search(encoder: Encoder, reference: SearchReference, tolerance: Tolerance) -> SearchParity | None:
    """Search the reference's pairs with the bundle's encoder. None if it has no pairs.

    Raises:
        ToleranceError: R@1 falls by more than 0.5 points, or with few pairs by more than one query.
    """
    pairs = reference.searched
    if pairs is None or pairs.images is None or reference.embeddings is None:
        return None
    embeddings = encoder.encode_texts(pairs.captions), encoder.encode_images(pairs.images)
    recall, expected = (recall_at_1(*both, pairs.captions) for both in (embeddings, reference.embeddings))
    if expected - recall > max(RECALL_TOLERANCE, 0.5 / len(pairs.captions)) + 1e-9:
        raise ToleranceError(
            f"search diverges from PyTorch: R@1 {recall:.1%} instead of {expected:.1%} over {len(pairs.captions)} "
            f"pairs, allowed − {100 * RECALL_TOLERANCE:.1f} points. {tolerance.advice}",
            SEARCH_GRAPHS,
        )
    return SearchParity(recall, expected, len(pairs.captions))


def compare_embeddings(encoder: Encoder, reference: SearchReference, tolerance: Tolerance) -> EmbeddingParity:
    """Embed the reference's unusual texts and images with the bundle's encoder.

    Raises:
        ToleranceError: an embedding differs from that of transformers, by its tokens, its pixels or its graph.
    """
    odd = reference.odd
    limit = min(EMBEDDING_COSINE, tolerance.cosine)
    texts = (encoder.encode_texts(odd.texts) * odd.text_embeddings).sum(axis=1)
    images = (encoder.encode_images(odd.images) * odd.image_embeddings).sum(axis=1)
    for kind, cosines, inputs, graphs in (
        ("text", texts, odd.texts, SEARCH_GRAPHS[:2]),
        ("image", images, [f"{image.width} x {image.height} pixels" for image in odd.images], SEARCH_GRAPHS[2:]),
    ):
        worst = int(cosines.argmin())
        if cosines[worst] < limit:
            raise ToleranceError(
                f"the embedding of the {kind} {inputs[worst]!r:.60} diverges from transformers: cosine "
                f"{cosines[worst]:.4f}, required ≥ {limit}. {tolerance.advice}",
                graphs,
            )
    return EmbeddingParity(float(texts.min()), float(images.min()), limit, len(texts), len(images))


def recall_at_1(texts: NDArray[np.float32], images: NDArray[np.float32], captions: Sequence[str]) -> float:
    """Return the mean R@1 of both directions; pairs with equal captions are all relevant."""
    directions = retrieval_figures(images, texts, [(normalize_caption(caption),) for caption in captions])
    return float(np.mean([direction["R@1"] for direction in directions.values()]))


def psnr_db(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two 8-bit images in decibels, at most 100."""
    mean_square = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return MAX_PSNR_DB if mean_square == 0 else min(MAX_PSNR_DB, 10 * float(np.log10(255**2 / mean_square)))
