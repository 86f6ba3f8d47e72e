"""Validation during training, always with the same pairs, noise, timesteps and prompts, so that results compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError, OptionError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.config import Component
from unidiff_sdk.training.data.captions import prompt_ids
from unidiff_sdk.training.data.latents import encode_latents
from unidiff_sdk.training.data.pairs import Pairs, load_pairs
from unidiff_sdk.training.objective import losses
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.callbacks import ModelSnapshot, StepReport, ValidationResult
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator

from . import metrics
from .retrieval import distinct_rows, embed_pairs, equal_keys, meaning_keys, retrieval_figures, synthetic_attributes
from .sampling import ImageArray, generate_images, sampler_settings, sampler_table

__all__ = [
    "RunCallback",
    "SearchExample",
    "SearchHit",
    "ValidationRecord",
    "Validator",
    "denoising_loss",
    "generate_by_own_sampler",
]

LOSS_PAIRS = 64  # validation pairs in the denoising loss
LOSS_TIMESTEPS = 4  # timesteps per pair
LOSS_BATCH = 16  # samples per UNet call
SAMPLES, EXAMPLES, HITS = 8, 4, 6


@dataclass(frozen=True)
class SearchHit:
    """One image that a search found.

    Attributes:
        row: Row of the validation data.
        image: uint8[h, w, 3].
        caption: Caption of the image.
        score: Cosine to the query.
        relevant: Whether the image has the meaning of the query.
    """

    row: int
    image: ImageArray
    caption: str
    score: float
    relevant: bool


@dataclass(frozen=True)
class SearchExample:
    """A search with a validation caption.

    Attributes:
        row: Row of the caption.
        caption: The query.
        rank: Rank of the first relevant image, from 1.
        expected: The caption's own image, uint8[h, w, 3].
        hits: The best hits, best first.
    """

    row: int
    caption: str
    rank: int
    expected: ImageArray
    hits: list[SearchHit]


@dataclass(frozen=True)
class ValidationRecord:
    """Everything that one validation produces.

    Attributes:
        step: Steps done.
        figures: Metrics by name.
        prompts: Prompts of the samples. Empty without a generator.
        samples: One generated image per prompt, uint8[h, w, 3].
        ranks: Rank of the first relevant image for each validation caption, from 1.
        examples: The first captions whose best hit is relevant, then the first whose best hit is not.
    """

    step: int
    figures: dict[str, float]
    prompts: list[str]
    samples: list[ImageArray]
    ranks: list[int]
    examples: list[SearchExample]


class RunCallback(Protocol):
    """Receives the events of a run, for example to log or display them."""

    def on_step(self, report: StepReport) -> None: ...
    def on_validation(self, record: ValidationRecord) -> None: ...


class Validator:
    """Validates the model when the trainer asks for it: `train(…, on_validate=Validator("products-val"))`.

    The score is the mean of R@1, R@5 and R@10 in both directions. If the encoder is not trained, it is the negative
    denoising loss.

    Args:
        data: A catalog of pairs that are not trained on.
        callbacks: Receive each validation.
        prompts: Prompts to generate samples for. Default: the first captions with different meanings.
        steps: Denoising steps of the samples. Default: the checkpoint's own, else 20.
        columns: Names of columns, see `read_catalog`.
        strict: Raise for the first invalid row instead of skipping it.
        on_invalid_rows: Called with the skipped rows once the data is read.
    """

    def __init__(
        self,
        data: str | Path,
        callbacks: Sequence[RunCallback] = (),
        *,
        prompts: Sequence[str] = (),
        steps: int | None = None,
        columns: Mapping[str, str | None] | None = None,
        strict: bool = False,
        on_invalid_rows: Callable[[Path, list[InvalidRow]], None] = lambda folder, rows: None,
    ) -> None:
        self.data = Path(data)
        self.callbacks = callbacks
        self.prompts = list(prompts)
        self.steps = steps
        self.columns = columns
        self.strict = strict
        self.on_invalid_rows = on_invalid_rows
        self._data: _ValidationData | None = None

    def __call__(self, snapshot: ModelSnapshot) -> ValidationResult:
        started = time.perf_counter()
        data = self._data = self._data or self._read(snapshot)
        u, v = embed_pairs(snapshot.model, snapshot.checkpoint, data.pairs)
        figures = self._figures(snapshot, data, u, v)
        config = snapshot.config
        trains_clip = config.trains_encoder and not config.locked >= {Component.IMAGE, Component.TEXT}
        score = figures["mean_recall"] if trains_clip else -figures["denoising_loss"]
        if not snapshot.score_only:
            self._notify(snapshot, data, v @ u.T, figures, started)
        return ValidationResult(score, figures, self.data.name, data.pairs.sha256)

    def _read(self, snapshot: ModelSnapshot) -> _ValidationData:
        if self.prompts and not isinstance(snapshot.model, JointModel):
            raise OptionError("Samples for prompts need a generator, which the base does not have. Leave prompts out.")
        pairs = load_pairs(
            self.data, snapshot.checkpoint, columns=self.columns, strict=self.strict, fit=snapshot.config.fit
        )
        if pairs.invalid_rows:
            self.on_invalid_rows(self.data, pairs.invalid_rows)
        if len(pairs) < 2:
            raise DataError(f"{self.data} holds {len(pairs)} valid pair, but validation needs at least 2.")
        latents = None
        if isinstance(snapshot.model, JointModel):
            latents = encode_latents(snapshot.model, pairs.images.first(LOSS_PAIRS))
        return _ValidationData(pairs, meaning_keys(pairs, synthetic_attributes(pairs)), latents)

    def _figures(
        self, snapshot: ModelSnapshot, data: _ValidationData, u: NDArray[np.float32], v: NDArray[np.float32]
    ) -> dict[str, float]:
        by_direction = retrieval_figures(u, v, data.keys)
        retrieval = {
            f"{direction} {name}": value for direction, found in by_direction.items() for name, value in found.items()
        }
        denoising = {}
        if data.latents is not None and isinstance(snapshot.model, JointModel):
            captions = prompt_ids(snapshot.checkpoint, data.pairs.captions[:LOSS_PAIRS])
            denoising = {"denoising_loss": denoising_loss(snapshot.model, data.latents, captions)}
        return {
            "mean_recall": float(np.mean([value for name, value in retrieval.items() if "R@" in name])),
            **retrieval,
            **denoising,
            "image_effective_rank": metrics.effective_rank(u),
            "text_effective_rank": metrics.effective_rank(v),
            "image_mean_cosine": metrics.mean_pairwise_cosine(u),
        }

    def _notify(
        self,
        snapshot: ModelSnapshot,
        data: _ValidationData,
        similarity: NDArray[np.float32],
        figures: dict[str, float],
        started: float,
    ) -> None:
        """Generate samples and search examples and pass everything to the callbacks. similarity: float[n, n]."""
        prompts, samples = self._samples(snapshot, data)
        relevant = equal_keys(data.keys)
        ranks = metrics.first_relevant_rank(similarity, relevant).tolist()
        examples = _search_examples(data.pairs, similarity, relevant, ranks)
        figures["seconds"] = time.perf_counter() - started
        record = ValidationRecord(snapshot.step, figures, prompts, samples, ranks, examples)
        for callback in self.callbacks:
            callback.on_validation(record)

    def _samples(self, snapshot: ModelSnapshot, data: _ValidationData) -> tuple[list[str], list[ImageArray]]:
        """Prompts, and an image for each. None without a generator."""
        model, checkpoint = snapshot.model, snapshot.checkpoint
        if not (isinstance(model, JointModel) and isinstance(checkpoint, Checkpoint)):
            return [], []
        prompts = self.prompts or [data.pairs.captions[row] for row in distinct_rows(data.keys, SAMPLES)]
        return prompts, generate_by_own_sampler(model, checkpoint, prompts, seed=0, steps=self.steps)


@dataclass(frozen=True)
class _ValidationData:
    """The validation pairs, the keys of their meanings, and with a generator the latents of the first `LOSS_PAIRS`."""

    pairs: Pairs
    keys: list[tuple[Any, ...]]
    latents: Tensor | None


def generate_by_own_sampler(
    model: JointModel, checkpoint: Checkpoint, prompts: Sequence[str], *, seed: int, steps: int | None = None
) -> list[ImageArray]:
    """Generate one image per prompt with the checkpoint's own sampler, else with the runtime's default.

    steps: Denoising steps. Default: as the sampler. Returns uint8[h, w, 3] for each prompt.
    """
    sampler, steps, guidance = sampler_settings(checkpoint, steps=steps)
    table = sampler_table(checkpoint, sampler, steps)
    return generate_images(model, checkpoint, prompts, table=table, guidance=guidance, seed=seed)


@torch.no_grad()
def denoising_loss(model: JointModel, latents: Tensor, input_ids: Tensor, *, batch_size: int = LOSS_BATCH) -> float:
    """Unweighted mean squared error of the UNet's output, with fixed noise and timesteps.

    Each pair is denoised from `LOSS_TIMESTEPS` timesteps. All timesteps together are evenly spaced over the schedule,
    so that few pairs cover all of it.

    Args:
        latents: float[n, c, h, w].
        input_ids: int64[n, tokens], see `prompt_ids`.
        batch_size: Samples per UNet call.
    """
    device, total = model.device, len(latents) * LOSS_TIMESTEPS
    random = seeded_generator(0, Purpose.VALIDATION)
    places = (torch.randperm(total, generator=random) + 0.5) / total
    levels = (places * len(model.alpha_bar)).long()
    noise = torch.randn((total, *latents.shape[1:]), generator=random)
    rows = torch.arange(total) // LOSS_TIMESTEPS
    squared = 0.0
    for chunk in torch.arange(total).split(batch_size):
        t, z, epsilon = levels[chunk].to(device), latents[rows[chunk]].to(device), noise[chunk].to(device)
        alpha_bar = model.alpha_bar[t]
        with model.autocast():
            conditions = model.encode_prompts(input_ids[rows[chunk]].to(device))
            z_t = losses.add_noise(z, epsilon, alpha_bar, model.prediction_type)
            output = model.predict(z_t, model.timesteps[t], conditions).float()
        target = losses.diffusion_target(z, epsilon, alpha_bar, model.prediction_type)
        squared += float((output - target).square().mean()) * len(chunk)
    return squared / total


def _search_examples(
    pairs: Pairs, similarity: NDArray[np.float32], relevant: NDArray[np.bool_], ranks: Sequence[int]
) -> list[SearchExample]:
    """Chosen by their order in the data: the first captions that rank a relevant image first, then the first others."""
    found = [row for row, rank in enumerate(ranks) if rank == 1][:EXAMPLES]
    missed = [row for row, rank in enumerate(ranks) if rank > 1][:EXAMPLES]
    examples = []
    for row in found + missed:
        best = np.argsort(-similarity[row], kind="stable")[:HITS].tolist()
        expected, *images = pairs.images[torch.tensor([row, *best])].permute(0, 2, 3, 1).numpy()
        hits = [
            SearchHit(hit, image, pairs.captions[hit], float(similarity[row, hit]), bool(relevant[row, hit]))
            for hit, image in zip(best, images, strict=True)
        ]
        examples.append(SearchExample(row, pairs.captions[row], ranks[row], expected, hits))
    return examples
