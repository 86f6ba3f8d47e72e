"""The gradients of a step's whole batch, independent of micro-batches and processes.

Per-sample terms are means, so their gradients are sums over micro-batches. Pairwise terms (contrast, consistency of
scores) need all embeddings at once. Gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size
under memory limited setup") embeds every micro-batch without a graph, differentiates these terms with respect to the
embeddings, and embeds each micro-batch once more to carry those gradients on to the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.data.batches import BatchIndices, BatchLoader
from unidiff_sdk.training.data.feature_distillation import embed_texts
from unidiff_sdk.training.objective import losses
from unidiff_sdk.training.objective.batch import Batch, RandomInputs
from unidiff_sdk.training.objective.encoder_model import EncoderModel
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.objective.reward import RewardInputs, reward_loss, reward_table
from unidiff_sdk.training.objective.score_consistency import (
    Ranking,
    ScoreInputs,
    choose_candidates,
    encoder_logits,
    generator_logits,
)
from unidiff_sdk.training.objective.terms import ForwardOutput, forward, pairwise_terms, prior_terms, term_weights
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.randomness import Purpose, derive_seed, seeded_generator
from unidiff_sdk.training.runtime.sharding import is_sharded

__all__ = ["backpropagate"]


@dataclass(frozen=True)
class MicroBatch:
    """Pairs that pass through the models at once.

    Attributes:
        positions: int64[k], ascending positions in the step's batch of m pairs.
        load: Loads the model inputs.
        random: Random inputs of the pairs that pass through the UNet, which come first.
        seed: Seed of dropout, so that both passes over the micro-batch agree.
    """

    positions: Tensor
    load: Callable[[], Batch]
    random: RandomInputs
    seed: int


def backpropagate(
    model: EncoderModel,
    batches: BatchLoader,
    config: TrainingConfig,
    *,
    step: int,
    empty_ids: Tensor,
    processes: Processes,
    prior: BatchLoader | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """Compute the gradients of a step into the model's parameters.

    Args:
        batches: The catalog.
        step: Number of the step, from 0.
        empty_ids: int64[1, tokens], the tokens of "".
        prior: Prior pairs, one batch of which is trained on as well.
        scale: Factor of the loss, for gradients in half precision.

    Returns:
        The value of each term, without its weight and the scale.
    """
    weights = {name: scale * weight for name, weight in term_weights(config, step).items()}

    # 1. the step's pairs and random inputs, equal in every process, and the micro-batches of this process
    indices, random = _sample_step(model, batches, config, step, config.batch_size)
    micro_batches = _micro_batches(batches, indices, random, config, step, processes)

    run = partial(_forward, model, config, empty_ids)

    # 2. all embeddings; a single micro-batch keeps its graph, several are computed again in 4
    whole = run(micro_batches[0]) if len(micro_batches) == 1 else None
    leaves: dict[str, Tensor] = {}
    if config.embeds_images:
        with torch.no_grad():
            embedded = [(part, (whole or run(part, embeddings_only=True)).embeddings) for part in micro_batches]
            leaves = _gather(embedded, len(indices), processes)

    # 3. pairwise terms, and their gradients with respect to the embeddings
    groups = batches.groups[indices.rows].to(processes.device)
    terms: dict[str, Tensor] = {}
    ranking = None
    if config.ranks and isinstance(model, JointModel):
        candidates = choose_candidates(leaves["u"], leaves["v"], groups, config, random.samples)
        teacher_logits = encoder_logits(leaves["u"], leaves["v"], candidates, model.clip.logit_scale).detach()
        ranking, found = _backward_ranking(
            model, batches, indices, config, step, empty_ids, processes, weights, candidates, teacher_logits
        )
        _add(terms, found)
    if config.lambda_rsc_reward and isinstance(model, JointModel):
        v = leaves["v"].detach() if leaves else _embed_captions(batches, indices)
        _add(terms, _backward_reward(model, batches, indices, config, step, empty_ids, processes, weights, v, groups))
    values = pairwise_terms(model, leaves, groups, config, ranking)
    _backward_pairwise(model, values, weights, processes)

    # 4. back through the models
    for micro_batch in micro_batches:
        output = whole or run(micro_batch)
        _backward(output, micro_batch, leaves, weights)
        _add(terms, output.terms)

    # 5. prior pairs, which have per-sample terms only
    if prior is not None:
        _add(terms, _backward_prior(model, prior, config, step, empty_ids, processes, weights))
    # Those of sharded weights are sums over the processes already.
    processes.sum_gradients(p for p in model.parameters() if p.requires_grad and not is_sharded(p))
    values |= {name: processes.sum(value) for name, value in terms.items()}
    return {name: values[name].item() for name in weights if name in values}


def _sample_step(
    model: EncoderModel, batches: BatchLoader, config: TrainingConfig, step: int, samples: int
) -> tuple[BatchIndices, RandomInputs]:
    """The pairs of a step, and the random inputs of the first ones, at most `samples`, that pass through the UNet."""
    indices = batches.indices(step)
    if not isinstance(model, JointModel):
        return indices, RandomInputs.none(len(indices))
    generator = seeded_generator(batches.seed, Purpose.NOISE, step)
    samples, shape = min(samples, len(indices)), batches.latent_shape(indices)
    random = RandomInputs.sample(
        *(generator, samples, shape, len(model.timesteps), config),
        pairs=len(indices),
        logit_normal=model.is_transformer,
    )
    return indices, random


def _micro_batches(
    batches: BatchLoader,
    indices: BatchIndices,
    random: RandomInputs,
    config: TrainingConfig,
    step: int,
    processes: Processes,
) -> list[MicroBatch]:
    """The share of this process in micro-batches of at most `micro_batch` pairs."""
    mine = processes.shard(len(indices))
    micro_batches = []
    for number, positions in enumerate(mine.split(config.micro_batch or len(mine))):
        samples = positions[positions < random.samples]
        load = partial(batches.load, indices.select(positions), len(samples))
        seed = derive_seed(batches.seed, Purpose.DROPOUT, step, processes.rank, number)
        micro_batches.append(MicroBatch(positions, load, random.select(samples), seed))
    return micro_batches


def _forward(
    model: EncoderModel,
    config: TrainingConfig,
    empty_ids: Tensor,
    micro_batch: MicroBatch,
    embeddings_only: bool = False,
) -> ForwardOutput:
    torch.manual_seed(micro_batch.seed)
    return forward(
        model,
        micro_batch.load(),
        config,
        random=micro_batch.random,
        empty_ids=empty_ids,
        embeddings_only=embeddings_only,
    )


def _gather(
    embedded: list[tuple[MicroBatch, dict[str, Tensor]]], pairs: int, processes: Processes
) -> dict[str, Tensor]:
    """The embeddings u and v of the whole step's m `pairs` as leaves: float[m, d]."""
    leaves = {}
    for name, first in embedded[0][1].items():
        rows = first.new_zeros(pairs, first.shape[1])
        for micro_batch, embeddings in embedded:
            rows[micro_batch.positions.to(rows.device)] = embeddings[name].detach()
        leaves[name] = processes.sum(rows).requires_grad_()
    return leaves


def _backward_pairwise(
    model: EncoderModel, values: Mapping[str, Tensor], weights: Mapping[str, float], processes: Processes
) -> None:
    if not values:
        return
    torch.stack([weights[name] * value for name, value in values.items()]).sum().backward()
    for parameter in model.contrast_parameters():
        if parameter.grad is not None:  # every process has computed the whole of it
            parameter.grad /= processes.world_size


def _backward(
    output: ForwardOutput, micro_batch: MicroBatch, leaves: Mapping[str, Tensor], weights: Mapping[str, float]
) -> None:
    """Backward pass of a micro-batch: its share of the per-sample terms, and the gradients of its embeddings."""
    tensors, gradients = [], []
    for name, embedding in output.embeddings.items():
        gradient = leaves[name].grad if name in leaves else None
        if gradient is not None and embedding.requires_grad:
            tensors.append(embedding)
            gradients.append(gradient[micro_batch.positions.to(gradient.device)])
    for name, value in output.terms.items():
        if value.requires_grad:
            tensors.append(weights[name] * value)
            gradients.append(torch.ones_like(value))
    if tensors:
        torch.autograd.backward(tensors, gradients)


def _backward_ranking(
    model: JointModel,
    batches: BatchLoader,
    indices: BatchIndices,
    config: TrainingConfig,
    step: int,
    empty_ids: Tensor,
    processes: Processes,
    weights: Mapping[str, float],
    candidates: Tensor,
    teacher_logits: Tensor,
) -> tuple[Ranking, dict[str, Tensor]]:
    """Rank the candidates by the generator, with the backward pass of "rsc_generator" if it is active.

    candidates: int64[a, c], see `choose_candidates`. teacher_logits: float[a, c], the encoder's.
    """
    captions = len(candidates)
    generator = seeded_generator(batches.seed, Purpose.SCORE, step)
    inputs = ScoreInputs.sample(generator, captions, batches.latent_shape(indices), model.timesteps.cpu(), config)
    logits = torch.zeros_like(teacher_logits)
    terms: dict[str, Tensor] = {}
    mine = processes.shard(captions)
    at_once = max(1, config.micro_batch // candidates.shape[1]) if config.micro_batch else captions
    for number, part in enumerate(mine.split(at_once) if len(mine) else ()):
        torch.manual_seed(derive_seed(batches.seed, Purpose.SCORE, step, processes.rank, number))
        images = candidates[part.to(candidates.device)].cpu()
        candidate = indices.select(images.flatten())
        latents = batches.load_latents(candidate).unflatten(0, images.shape)
        sizes = batches.load_sizes(candidate).unflatten(0, images.shape)
        input_ids = batches.input_ids[indices.rows[part]].to(model.device)
        with torch.set_grad_enabled(config.lambda_rsc_generator > 0):
            found = generator_logits(model, latents, input_ids, empty_ids, inputs.select(part), sizes)
        logits[part.to(logits.device)] = found.detach()
        if config.lambda_rsc_generator:
            share = len(part) / captions
            value = losses.score_consistency(found, teacher_logits[part.to(logits.device)]) * share
            if value.requires_grad:  # not if all that it reaches is locked
                (weights["rsc_generator"] * value).backward()
            _add(terms, {"rsc_generator": value})
    return Ranking(candidates, processes.sum(logits)), terms


def _embed_captions(batches: BatchLoader, indices: BatchIndices) -> Tensor:
    """Embeddings of a step's captions, without gradients: float[m, d], unit rows."""
    ids = batches.input_ids if batches.clip_ids is None else batches.clip_ids
    return embed_texts(batches.model, ids[indices.rows]).to(batches.model.device)


def _backward_reward(
    model: JointModel,
    batches: BatchLoader,
    indices: BatchIndices,
    config: TrainingConfig,
    step: int,
    empty_ids: Tensor,
    processes: Processes,
    weights: Mapping[str, float],
    v: Tensor,
    groups: Tensor,
) -> dict[str, Tensor]:
    """Generate images for the step's first captions, and run the backward pass of their reward.

    v: float[m, d], embeddings of the step's captions. groups: int64[m], see `Batch`.
    """
    captions = min(config.rsc_reward_captions, len(v))
    table = reward_table(model, config)
    generator = seeded_generator(batches.seed, Purpose.REWARD, step)
    inputs = RewardInputs.sample(generator, captions, model.latent_shape, table)
    positives = losses.same_meaning(groups[:captions], groups)
    terms: dict[str, Tensor] = {}
    mine = processes.shard(captions)
    for number, part in enumerate(mine.split(config.micro_batch or captions) if len(mine) else ()):
        torch.manual_seed(derive_seed(batches.seed, Purpose.REWARD, step, processes.rank, number))
        input_ids = batches.input_ids[indices.rows[part]].to(model.device)
        right = positives[part.to(positives.device)]
        value = reward_loss(model, table, input_ids, empty_ids, v, right, inputs.select(part), config)
        value = value * (len(part) / captions)
        (weights["rsc_reward"] * value).backward()
        _add(terms, {"rsc_reward": value})
    return terms


def _backward_prior(
    model: EncoderModel,
    prior: BatchLoader,
    config: TrainingConfig,
    step: int,
    empty_ids: Tensor,
    processes: Processes,
    weights: Mapping[str, float],
) -> dict[str, Tensor]:
    """Backward pass of a batch of prior pairs. Returns the values of its terms."""
    indices, random = _sample_step(model, prior, config, step, prior.size)
    terms: dict[str, Tensor] = {}
    for micro_batch in _micro_batches(prior, indices, random, config, step, processes):
        torch.manual_seed(micro_batch.seed)
        found = prior_terms(model, micro_batch.load(), config, random=micro_batch.random, empty_ids=empty_ids)
        _backward(ForwardOutput(found, {}), micro_batch, {}, weights)
        _add(terms, found)
    return terms


def _add(totals: dict[str, Tensor], terms: Mapping[str, Tensor]) -> None:
    for name, value in terms.items():
        totals[name] = totals.get(name, 0.0) + value.detach()
