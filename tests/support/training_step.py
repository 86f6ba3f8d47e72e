"""One training step on a small checkpoint and catalog: the model, its batches, and the gradients of the step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.data.batches import BatchLoader
from unidiff_sdk.training.data.captions import clip_ids, group_keys, prompt_ids
from unidiff_sdk.training.data.pairs import load_pairs
from unidiff_sdk.training.loop.gradients import backpropagate
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.objective.tuning import add_adapters, set_trainable
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.randomness import Purpose, derive_seed

ALONE = Processes(0, 1, torch.device("cpu"))
# What each term trains in a model with two text encoders that are separate from CLIP.
PARTS_OF_TERMS = {
    "lambda_itc": {"clip text", "clip image"},
    "lambda_is": {"unet", "first", "second"},
    "lambda_rsc_encoder": {"clip text", "clip image"},
    "lambda_rsc_generator": {"unet", "first", "second"},
    "lambda_rsc_reward": {"unet"},
}


@dataclass
class TrainingStep:
    """What a step needs. captions: of all pairs. prior: batches of prior pairs, if there are any."""

    config: TrainingConfig
    model: JointModel
    batches: BatchLoader
    prior: BatchLoader | None
    empty_ids: torch.Tensor
    captions: list[str]

    def backpropagate(self, step: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Gradients by parameter, and the value of each term."""
        self.batches.refresh_negatives(step, ALONE)
        values = backpropagate(
            self.model,
            self.batches,
            self.config,
            step=step,
            empty_ids=self.empty_ids,
            processes=ALONE,
            prior=self.prior,
        )
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}, values


def prepare_step(
    base: Path,
    data: Path,
    config: TrainingConfig,
    *,
    prior: Path | None = None,
    disturbed: bool = False,
    checkpoint: Checkpoint | None = None,
    loader: type[BatchLoader] = BatchLoader,
) -> TrainingStep:
    """The step of a run at its start.

    disturbed: change the weights of CLIP after the base's embeddings are stored. checkpoint: the base, if it is not the
    one in the folder.
    """
    checkpoint = checkpoint or load_checkpoint(base)
    add_adapters(checkpoint, config)
    model = JointModel(checkpoint, config.precision).train()
    set_trainable(model, config)
    if config.checkpoint_activations:
        model.checkpoint_activations()

    def batches_of(folder: Path, size: int, seed: int, hard_negatives: int = 0) -> BatchLoader:
        pairs = load_pairs(folder, checkpoint, aspect_buckets=config.aspect_buckets)
        return loader(
            model,
            pairs,
            prompt_ids(checkpoint, pairs.captions),
            group_keys(pairs),
            size=size,
            flip=config.flip,
            seed=seed,
            clip_ids=clip_ids(checkpoint, pairs.captions),
            hard_negatives=hard_negatives,
            feature_distillation=config.lambda_feature_distillation > 0,
        )

    size = max(config.batch_size, config.contrastive_batch)
    batches = batches_of(data, size, config.seed, config.hard_negatives)
    prior_seed = derive_seed(config.seed, Purpose.PRIOR)
    prior_batches = batches_of(prior, config.prior_batch, prior_seed) if prior else None
    if disturbed:
        disturb(model)
    captions = load_pairs(data, checkpoint).captions
    return TrainingStep(config, model, batches, prior_batches, empty_ids_of(checkpoint), captions)


def empty_ids_of(checkpoint: Checkpoint) -> torch.Tensor:
    """The tokens of the empty caption, int64[1, tokens]."""
    return prompt_ids(checkpoint, [""])


def disturb(model: JointModel) -> None:
    """Add seeded noise to the weights of CLIP."""
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.clip.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)


def parts_trained_by(term: str, base: Path, data: Path, checkpoint: Checkpoint) -> set[str]:
    """The parts that a step with a single term has gradients for, see PARTS_OF_TERMS."""
    settings: dict[str, Any] = dict.fromkeys(PARTS_OF_TERMS, 0.0) | {term: 1.0, "batch_size": 6, "rsc_warmup_steps": 0}
    found, _ = prepare_step(base, data, TrainingConfig(**settings), checkpoint=checkpoint).backpropagate()
    places = {"unet.": "unet", "text_encoder.": "first", "text_encoder_2.": "second", "vae.": "vae"}
    places |= {"clip.text": "clip text", "clip.logit": "clip text", "clip.vis": "clip image"}
    reached = {name for name, gradient in found.items() if gradient.any()}
    return {part for name in reached for prefix, part in places.items() if name.startswith(prefix)}
