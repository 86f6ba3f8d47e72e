"""How good a model is while it learns, always by the same pairs, noise, timesteps and prompts: looks compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.errors import DataError
from unidiff_sdk.generation.samplers import make_table
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.config import Part
from unidiff_sdk.training.data.batches import Pairs, load_pairs, tokenize
from unidiff_sdk.training.data.latents import encode_latents
from unidiff_sdk.training.objective import losses
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.callbacks import Moment, StepReport, Validated
from unidiff_sdk.training.runtime.randomness import Purpose, generator

from . import metrics
from .evaluate import differing, embed, equal_keys, generate, meanings, retrieval, synthetic_attributes

__all__ = ["Example", "Validation", "Validator", "Watcher", "denoising_loss", "draw"]

LOSS_PAIRS = 64  # of the validation pairs the first so many are denoised,
LOSS_TIMESTEPS = 4  # each from so many timesteps
LOSS_BATCH = 16
SAMPLES, EXAMPLES, HITS = 8, 4, 6
SAMPLER = {"name": "dpm++2m", "steps": 20, "guidance_scale": 5.0}

Picture = NDArray[np.uint8]  # [h, w, 3]


@dataclass(frozen=True)
class Example:
    """A caption that was searched with: its row, the rank of the first relevant picture, the best hits.

    hits: (row, picture, caption, cosine, relevant), best first. sought: the caption's own picture.
    """

    row: int
    caption: str
    rank: int
    sought: Picture
    hits: list[tuple[int, Picture, str, float, bool]]


@dataclass(frozen=True)
class Validation:
    """One look at the model. ranks: of every validation caption, that of its first relevant picture, from 1."""

    step: int
    figures: dict[str, float]
    prompts: list[str]
    samples: list[Picture]  # one for each prompt
    ranks: list[int]
    examples: list[Example]  # the first few captions that are found at once, then the first few that are not


class Watcher(Protocol):
    """Who keeps or shows what a run tells."""

    def on_step(self, report: StepReport) -> None: ...
    def on_validation(self, validation: Validation) -> None: ...


class Validator:
    """Looks at the model whenever the trainer asks (`train(on_validate=…)`), and tells the watchers.

    data: pairs that are not trained on. prompts: what to draw; default: the first captions of `data` that differ in
    meaning. on_bad_rows: told of the rows of `data` that are passed over, as soon as they are read.

    The score is the mean of R@1, R@5 and R@10 both ways where the encoder is trained, else the denoising loss, negated.
    """

    def __init__(
        self,
        data: str | Path,
        watchers: Sequence[Watcher] = (),
        *,
        prompts: Sequence[str] = (),
        strict: bool = False,
        on_bad_rows: Callable[[Path, list[InvalidRow]], None] = lambda folder, rows: None,
    ) -> None:
        self.data = data
        self.watchers = watchers
        self.prompts = list(prompts)
        self.strict = strict
        self.on_bad_rows = on_bad_rows
        self._pairs: Pairs | None = None
        self._latents: Tensor | None = None

    def __call__(self, moment: Moment) -> Validated:
        started = time.perf_counter()
        model, checkpoint = moment.model, moment.checkpoint

        # 1. what is looked at, read at the first look
        pairs = self._read(moment)
        attributes = synthetic_attributes(pairs)
        keys = meanings(pairs, attributes)

        # 2. retrieval, and whether embeddings collapse
        u, v = embed(model, checkpoint, pairs)
        found = retrieval(u, v, keys)
        recalls = {f"{way} {name}": value for way, figures in found.items() for name, value in figures.items()}
        mean_recall = float(np.mean([value for name, value in recalls.items() if "R@" in name]))
        relevant = equal_keys(keys)

        # 3. denoising
        assert self._latents is not None
        loss = denoising_loss(model, self._latents, tokenize(checkpoint.tokenizer, pairs.captions[:LOSS_PAIRS]))
        figures = {
            "mean_recall": mean_recall,
            **recalls,
            "denoising_loss": loss,
            "image_effective_rank": metrics.effective_rank(u),
            "text_effective_rank": metrics.effective_rank(v),
            "image_mean_cosine": metrics.mean_pairwise_cosine(u),
        }
        retrieves = moment.config.trains_encoder and not moment.config.locked >= {Part.IMAGE, Part.TEXT}
        validated = Validated(mean_recall if retrieves else -loss, figures, pairs.fingerprint())
        if moment.quick:
            return validated

        # 4. samples and searches, for those who watch
        prompts = self.prompts or [pairs.captions[row] for row in differing(keys, SAMPLES)]
        samples = draw(model, checkpoint, prompts, seed=0)
        similarity = v @ u.T
        ranks = metrics.first_relevant_rank(similarity, relevant).tolist()
        examples = _examples(pairs, similarity, relevant, ranks)
        figures["seconds"] = time.perf_counter() - started
        for watcher in self.watchers:
            watcher.on_validation(Validation(moment.step, figures, prompts, samples, ranks, examples))
        return validated

    def _read(self, moment: Moment) -> Pairs:
        if self._pairs is None:
            pairs = load_pairs(self.data, moment.checkpoint, strict=self.strict, fit=moment.config.fit)
            if pairs.bad:
                self.on_bad_rows(Path(self.data), pairs.bad)
            if len(pairs) < 2:
                raise DataError(f"{self.data} holds a single usable pair: validation needs at least two")
            self._latents = encode_latents(moment.model, pairs.images.first(LOSS_PAIRS))
            self._pairs = pairs
        return self._pairs


def draw(model: JointModel, checkpoint: Checkpoint, prompts: Sequence[str], *, seed: int) -> list[Picture]:
    """A picture for each prompt, by the checkpoint's own sampler, else by one that suits most."""
    sampler = SAMPLER | checkpoint.meta.get("sampler", {})
    table = make_table(sampler["name"], Schedule.from_config(checkpoint.scheduler.config), sampler["steps"])
    return generate(model, checkpoint, prompts, table=table, guidance=sampler["guidance_scale"], seed=seed)


@torch.no_grad()
def denoising_loss(model: JointModel, latents: Tensor, input_ids: Tensor) -> float:
    """The mean squared error of the UNet's output, unweighted, with noise and timesteps that never change.

    latents: float[n, c, h, w]; input_ids: int64[n, tokens]. Each pair is denoised from `LOSS_TIMESTEPS` timesteps; all
    of them together lie evenly on the schedule, so that few pairs measure all of it.
    """
    device, total = model.alpha_bar.device, len(latents) * LOSS_TIMESTEPS
    random = generator(0, Purpose.VALIDATION)
    places = (torch.randperm(total, generator=random) + 0.5) / total
    timesteps = (places * len(model.alpha_bar)).long()
    noise = torch.randn((total, *latents.shape[1:]), generator=random)
    rows = torch.arange(total) // LOSS_TIMESTEPS
    squared = 0.0
    for chunk in torch.arange(total).split(LOSS_BATCH):
        t, z, epsilon = timesteps[chunk].to(device), latents[rows[chunk]].to(device), noise[chunk].to(device)
        alpha_bar = model.alpha_bar[t]
        with model.autocast():
            states = model.text_encoder(input_ids[rows[chunk]].to(device)).last_hidden_state
            output = model.unet(losses.add_noise(z, epsilon, alpha_bar), t, states).sample.float()
        target = losses.diffusion_target(z, epsilon, alpha_bar, model.prediction_type)
        squared += float((output - target).square().mean()) * len(chunk)
    return squared / total


def _examples(
    pairs: Pairs, similarity: NDArray[np.float32], relevant: NDArray[np.bool_], ranks: Sequence[int]
) -> list[Example]:
    """Chosen by their place in the data: the first captions that are found at once, then the first that are not."""
    right = [row for row, rank in enumerate(ranks) if rank == 1][:EXAMPLES]
    wrong = [row for row, rank in enumerate(ranks) if rank > 1][:EXAMPLES]
    examples = []
    for row in right + wrong:
        best = np.argsort(-similarity[row], kind="stable")[:HITS].tolist()
        pictures = pairs.images[torch.tensor([row, *best])].permute(0, 2, 3, 1).numpy()
        hits = [
            (hit, picture, pairs.captions[hit], float(similarity[row, hit]), bool(relevant[row, hit]))
            for hit, picture in zip(best, pictures[1:], strict=True)
        ]
        examples.append(Example(row, pairs.captions[row], ranks[row], pictures[0], hits))
    return examples
