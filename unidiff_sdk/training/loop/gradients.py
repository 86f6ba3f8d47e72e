"""The gradients of one step's whole batch, however it is cut into parts and spread over processes.

Means over samples are sums of their parts' shares. Terms *between* samples (the contrast, the structure of features)
need all embeddings at once: gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size under
memory limited setup") first embeds every part without a graph, differentiates these terms by the embeddings, and then
embeds part by part once more to carry those gradients on to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.data.batches import Batches, Choice
from unidiff_sdk.training.objective.joint_model import (
    Batch,
    Draws,
    Forward,
    JointModel,
    contrast,
    forward,
    prior_means,
    term_weights,
)
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.randomness import Purpose, generator, seed_of

__all__ = ["backpropagate"]


@dataclass(frozen=True)
class Part:
    """What goes through the models at once. positions: int64[k], ascending, in the step's batch of m pairs."""

    positions: Tensor
    load: Callable[[], Batch]
    draws: Draws  # of its first pairs, those that go through the UNet
    seed: int  # of dropout, so that a part embedded twice is embedded alike

    def places(self, embedding: str) -> Tensor:
        """Where in the step's batch the rows of this embedding stand: u and v are of all pairs."""
        return self.positions if embedding in ("u", "v") else self.positions[: len(self.draws.t)]


def backpropagate(
    model: JointModel,
    batches: Batches,
    config: TrainingConfig,
    *,
    step: int,
    empty_ids: Tensor,
    teacher: Mapping[str, Tensor] | None,
    processes: Processes,
    prior: Batches | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """Leave the gradients of step `step`, counted from 0, in the model's parameters. Returns each term's plain value.

    teacher: weights of RSC's teacher, see `joint_losses`. prior: pairs of the base's own world, a batch of which is
    learned from beside that of `batches`. scale: of the loss that is differentiated, where gradients live in half
    precision.
    """
    # 1. the step's pairs and draws, the same in every process, and this one's parts of them
    choice, draws = _draw(model, batches, config, step, config.batch_size)
    parts = _parts(batches, choice, draws, config, step, processes)
    weights = {name: scale * weight for name, weight in term_weights(config, step).items()}

    def run(part: Part, embeddings_only: bool = False) -> Forward:
        torch.manual_seed(part.seed)
        return forward(
            model,
            part.load(),
            config,
            draws=part.draws,
            empty_ids=empty_ids,
            teacher=teacher,
            embeddings_only=embeddings_only,
        )

    # 2. all embeddings; a lone part keeps its graph, of several each is computed again in 4
    whole = run(parts[0]) if len(parts) == 1 else None
    leaves: dict[str, Tensor] = {}
    if config.trains_encoder:
        with torch.no_grad():
            embedded = [(part, (whole or run(part, embeddings_only=True)).embeddings) for part in parts]
            leaves = _gather(embedded, draws.pairs, draws.samples, processes)

    # 3. the terms between samples, and their gradients by the embeddings
    groups = batches.groups[choice.rows].to(processes.device)
    values = contrast(model, leaves, groups, config, draws)
    if values:
        torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()
        temperature = model.clip.logit_scale
        if temperature.grad is not None:  # every process has computed the whole of it
            temperature.grad /= processes.world

    # 4. back through the models
    means: dict[str, Tensor] = {}
    for part in parts:
        result = whole or run(part)
        _backward(result, part, leaves, weights)
        means |= {name: means.get(name, 0.0) + value.detach() for name, value in result.means.items()}

    # 5. the base's own world, which has only means
    if prior is not None:
        choice, draws = _draw(model, prior, config, step, prior.size)
        for part in _parts(prior, choice, draws, config, step, processes):
            torch.manual_seed(part.seed)
            found = prior_means(model, part.load(), config, draws=part.draws, empty_ids=empty_ids)
            _backward(Forward(found, {}), part, {}, weights)
            means |= {name: means.get(name, 0.0) + value.detach() for name, value in found.items()}
    processes.sum_gradients(p for p in model.parameters() if p.requires_grad)
    values |= {name: processes.sum(value) for name, value in means.items()}
    return {name: values[name].item() for name in weights if name in values}


def _draw(model: JointModel, batches: Batches, config: TrainingConfig, step: int, most: int) -> tuple[Choice, Draws]:
    """The pairs of a step, and what chance decides of the first of them, at most so many, that the UNet sees."""
    choice = batches.choose(step)
    random = generator(batches.seed, Purpose.NOISE, step)
    pairs = len(choice.rows)
    shape, timesteps = batches.latent_shape, len(model.alpha_bar)
    return choice, Draws.of(random, min(most, pairs), shape, timesteps, config, pairs=pairs)


def _parts(
    batches: Batches, choice: Choice, draws: Draws, config: TrainingConfig, step: int, processes: Processes
) -> list[Part]:
    """This process's share of the step, in pieces of at most `micro_batch` pairs."""
    mine = processes.mine(len(choice.rows))
    parts = []
    for number, positions in enumerate(mine.split(config.micro_batch or len(mine))):
        samples = positions[positions < draws.samples]
        load = partial(batches.load, Choice(choice.rows[positions], choice.mirror[positions]), len(samples))
        seed = seed_of(batches.seed, Purpose.DROPOUT, step, processes.rank, number)
        parts.append(Part(positions, load, draws.rows(samples), seed))
    return parts


def _gather(
    embedded: list[tuple[Part, dict[str, Tensor]]], pairs: int, samples: int, processes: Processes
) -> dict[str, Tensor]:
    """The step's embeddings as leaves, each row from the part that has it: m rows of u and v, n of the others."""
    leaves = {}
    for name in embedded[0][1]:
        first = embedded[0][1][name]
        rows = first.new_zeros(pairs if name in ("u", "v") else samples, first.shape[1])
        for part, embeddings in embedded:
            if name in embeddings:
                rows[part.places(name).to(rows.device)] = embeddings[name].detach()
        leaves[name] = processes.sum(rows).requires_grad_()
    return leaves


def _backward(result: Forward, part: Part, leaves: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    """Through one part: its share of the means, and what the terms between samples ask of its embeddings."""
    tensors, gradients = [], []
    for name, embedding in result.embeddings.items():
        asked = leaves[name].grad if name in leaves else None
        if asked is not None and embedding.requires_grad:
            tensors.append(embedding)
            gradients.append(asked[part.places(name).to(asked.device)])
    for name, value in result.means.items():
        if value.requires_grad:
            tensors.append(weights[name] * value)
            gradients.append(torch.ones_like(value))
    if tensors:
        torch.autograd.backward(tensors, gradients)
