"""Evaluation of a checkpoint on a catalog: retrieval, generation, collapse and forgetting.

Generated images are judged by the frozen judge, never by the CLIP under test. On the synthetic catalogs, an image is
relevant to a caption if their attributes are equal; on other data, if their normalized captions are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk._internal.json_values import plain_number, whole_number
from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiff_sdk.training.data.fitted_images import FittedImages
from unidiff_sdk.training.data.pairs import Pairs, load_pairs
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.processes import pick_device

from . import metrics
from .judge import Judge, attribute_accuracy
from .retrieval import distinct_rows, embed_pairs, meaning_keys, retrieval_figures, synthetic_attributes
from .sampling import ImageArray, generate_images, sampler_settings, sampler_table

__all__ = ["EvaluationResult", "evaluate"]

CHUNK = 64  # images read at a time
SHEET_COLUMNS = 10

Features = NDArray[np.float32]


@dataclass(frozen=True)
class EvaluationResult:
    """Result of an evaluation.

    Attributes:
        figures: Nested figures, JSON-serializable.
        sheet: Contact sheet of the first generated images. None if none were generated.
        invalid_rows: Rows of the data that were skipped.
    """

    figures: dict[str, Any]
    sheet: Image.Image | None
    invalid_rows: list[InvalidRow]


def evaluate(
    checkpoint: str | Path,
    data: str | Path,
    *,
    prompts: int = 100,
    per_prompt: int = 2,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    columns: Mapping[str, str | None] | None = None,
    train_data: str | Path | None = None,
    base: str | Path | None = None,
    base_data: str | Path | None = None,
    device: str = "auto",
    strict: bool = False,
    judge: Judge | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> EvaluationResult:
    """Measure a checkpoint on a catalog.

        from unidiff_sdk.training import evaluate

        result = evaluate("runs/shop", "products-test", prompts=0)
        print(result.figures["retrieval"]["text_to_image"]["R@1"])

    Args:
        checkpoint: A checkpoint folder, or "tiny".
        data: A catalog folder or shards.
        prompts: Number of captions with different meanings to generate images for. 0: measure retrieval only.
        per_prompt: Images per caption, above 0.
        sampler: Sampler. Default for this and the next two: the checkpoint's own, else 20 steps of dpm++2m at a
            guidance scale of 5.
        steps: Denoising steps, above 0.
        guidance: Guidance scale, at least 0. 1: no guidance.
        seed: Seed of the generated images, at least 0.
        limit: Use the first pairs of `data` only, at least 2.
        columns: Names of columns of `data` and `train_data`, see `read_catalog`.
        train_data: Training data of the checkpoint, to measure whether generated images are copies.
        base: Checkpoint before tuning. With `base_data`, measures forgetting.
        base_data: Data that the base was trained on.
        device: "auto", "cpu" or "cuda".
        strict: Raise for the first invalid row instead of skipping it.
        judge: Judge of the generated images. Default: the frozen judge of the synthetic catalogs.
        on_stage: Called with a description of each stage when it starts.

    Raises:
        DataError: A catalog is missing or has no valid row.
        CheckpointError: A checkpoint is missing or incomplete.
        OptionError: An argument is out of range, or only one of `base` and `base_data` is given.
    """
    prompts, per_prompt = (
        whole_number("prompts", prompts, at_least=0),
        whole_number("per_prompt", per_prompt, at_least=1),
    )
    steps, limit = _whole_or_none("steps", steps, 1), _whole_or_none("limit", limit, 2)
    seed, guidance = whole_number("seed", seed, at_least=0), _guidance_scale(guidance)
    if (base is None) != (base_data is None):
        raise OptionError("Measuring forgetting needs both base and base_data. Give both, or neither.")

    on_stage("Loading the checkpoint and the data")
    judge = judge or (Judge.load() if prompts else None)
    subject = _load(checkpoint, data, columns, device, limit, strict)
    figures: dict[str, Any] = {
        "checkpoint": subject.checkpoint.name,
        "data": subject.pairs.describe(data),
        "relevance": "attributes" if subject.attributes else "captions",
    }

    on_stage("Measuring retrieval")
    figures |= _retrieval(subject)

    images: list[ImageArray] = []
    if prompts:
        rows = [row for row in distinct_rows(subject.keys, prompts) for _ in range(per_prompt)]
        settings = sampler_settings(subject.checkpoint, sampler, steps, guidance)
        images = _generate(subject, rows, settings, seed, on_stage)
        on_stage("Judging the generated images")
        assert judge is not None
        gallery = load_pairs(train_data, subject.checkpoint, columns=columns) if train_data else None
        quality, collapse = _judge(subject, judge, images, rows, seed, gallery)
        figures["generation"] = {
            "prompts": len(rows) // per_prompt,
            "per_prompt": per_prompt,
            **dict(zip(("sampler", "steps", "guidance"), settings, strict=True)),
            "seed": seed,
            **quality,
        }
        figures["collapse"] |= collapse

    if base is not None and base_data is not None:
        on_stage("Measuring forgetting")
        figures["forgetting"] = _forgetting(subject, base, base_data, limit)
    return EvaluationResult(figures, _contact_sheet(images) if images else None, subject.pairs.invalid_rows)


@dataclass(frozen=True)
class _Subject:
    """The model under test and the data. keys: one per pair, see `meaning_keys`."""

    checkpoint: Checkpoint
    model: JointModel
    pairs: Pairs
    attributes: list[dict[str, str]] | None
    keys: list[tuple[Any, ...]]


def _whole_or_none(name: str, value: int | None, at_least: int) -> int | None:
    return None if value is None else whole_number(name, value, at_least=at_least)


def _guidance_scale(guidance: float | None) -> float | None:
    guidance = plain_number(guidance)
    if guidance is None:
        return None
    if not isinstance(guidance, int | float) or isinstance(guidance, bool) or not 0 <= guidance < math.inf:
        raise OptionError(f"guidance is {guidance!r:.60}; give a finite number of at least 0")
    return float(guidance)


def _load(
    checkpoint: str | Path,
    data: str | Path,
    columns: Mapping[str, str | None] | None,
    device: str,
    limit: int | None,
    strict: bool,
) -> _Subject:
    loaded = load_checkpoint(checkpoint)
    pairs = load_pairs(data, loaded, columns=columns, limit=limit, strict=strict)
    if len(pairs) < 2:
        raise OptionError(f"{data} holds {len(pairs)} valid pair, but retrieval needs at least 2.")
    attributes = synthetic_attributes(pairs)
    model = JointModel(loaded).to(pick_device(device)).eval()
    return _Subject(loaded, model, pairs, attributes, meaning_keys(pairs, attributes))


def _retrieval(subject: _Subject) -> dict[str, Any]:
    u, v = embed_pairs(subject.model, subject.checkpoint, subject.pairs)
    return {
        "retrieval": retrieval_figures(u, v, subject.keys),
        "collapse": {
            "image_effective_rank": metrics.effective_rank(u),
            "text_effective_rank": metrics.effective_rank(v),
            "image_mean_cosine": metrics.mean_pairwise_cosine(u),
            "text_mean_cosine": metrics.mean_pairwise_cosine(v),
        },
    }


def _generate(
    subject: _Subject,
    rows: Sequence[int],
    settings: tuple[str, int, float],
    seed: int,
    on_stage: Callable[[str], None],
) -> list[ImageArray]:
    """One image for the caption of each row. settings: (sampler, steps, guidance scale)."""
    sampler, steps, guidance = settings
    return generate_images(
        subject.model,
        subject.checkpoint,
        [subject.pairs.captions[row] for row in rows],
        table=sampler_table(subject.checkpoint, sampler, steps),
        guidance=guidance,
        seed=seed,
        on_progress=lambda done, total: on_stage(f"Generating images: {done}/{total}"),
    )


def _judge(
    subject: _Subject,
    judge: Judge,
    images: Sequence[ImageArray],
    rows: Sequence[int],
    seed: int,
    gallery: Pairs | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(quality, collapse) of generated images.

    Args:
        rows: The pair whose caption each image was generated from.
        gallery: The training data, to measure copies.
    """
    pairs, attributes = subject.pairs, subject.attributes
    generated, real = judge.features(images), judge.features(_arrays(pairs.images))
    # The judge was trained on synthetic images. On other data its distances compare runs, but mean little alone.
    quality: dict[str, Any] = {"judge": judge.record["sha256"], "judge_covers_data": attributes is not None}
    quality |= _distances(generated, real, seed)
    if attributes:
        expected = [attributes[row] for row in rows]
        quality["attribute_accuracy"] = attribute_accuracy(judge.attributes(images), expected)
        quality["attribute_accuracy_of_real"] = attribute_accuracy(judge.attributes(_arrays(pairs.images)), attributes)
    collapse: dict[str, Any] = {}
    if len(set(rows)) < len(rows):
        collapse["per_prompt_diversity"] = metrics.per_prompt_diversity(generated, rows)
    if gallery is not None:
        trained_on = judge.features(_arrays(gallery.images))
        collapse["nearest_training_image"] = {
            name: float(metrics.nearest_neighbor_similarity(features, trained_on)[0].mean())
            for name, features in {"generated": generated, "real": real}.items()
        }
    return quality, collapse


def _distances(generated: Features, real: Features, seed: int) -> dict[str, float]:
    """KID and CMMD to the real images. Their floors are the distances between two random halves of the real images."""
    half = np.random.default_rng(seed).permutation(len(real))
    a, b = real[half[: len(half) // 2]], real[half[len(half) // 2 :]]
    figures = {"kid": metrics.kid(generated, real), "cmmd": metrics.cmmd(generated, real)}
    if len(a) > 1:
        figures |= {"kid_floor": metrics.kid(a, b), "cmmd_floor": metrics.cmmd(a, b)}
    return figures


def _forgetting(subject: _Subject, base: str | Path, base_data: str | Path, limit: int | None) -> dict[str, Any]:
    """Mean R@1 of both directions on the base's data, before and after tuning. A positive drop means forgetting."""
    before_tuning = load_checkpoint(base)
    pairs = load_pairs(base_data, before_tuning, limit=limit)
    keys = meaning_keys(pairs, synthetic_attributes(pairs))

    def mean_recall(model: JointModel, checkpoint: Checkpoint) -> float:
        figures = retrieval_figures(*embed_pairs(model, checkpoint, pairs), keys)
        return float(np.mean([direction["R@1"] for direction in figures.values()]))

    before = mean_recall(JointModel(before_tuning).to(subject.model.device).eval(), before_tuning)
    after = mean_recall(subject.model, subject.checkpoint)
    return {"data": Path(base_data).name, "R@1_base": before, "R@1_tuned": after, "drop": before - after}


def _arrays(images: FittedImages) -> Iterator[ImageArray]:
    for chunk in images.split(CHUNK):
        yield from chunk.permute(0, 2, 3, 1).numpy()


def _contact_sheet(images: Sequence[ImageArray]) -> Image.Image:
    images = images[: SHEET_COLUMNS * SHEET_COLUMNS]
    height, width = images[0].shape[:2]
    columns = min(SHEET_COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image), (i % columns * width, i // columns * height))
    return sheet
