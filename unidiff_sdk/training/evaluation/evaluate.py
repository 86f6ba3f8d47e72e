"""What a checkpoint is worth on data: retrieval, generation, collapse and forgetting, by the measures of `metrics`.

Generated pictures are judged by the frozen judge, never by the CLIP under test. Relevance is equality of attributes on
the synthetic catalogs and of normalized captions on everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from unidiff_sdk.datasets.reader import InvalidRow
from unidiff_sdk.datasets.synthetic import ATTRIBUTES
from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.samplers import Coefficients, Table, advance, make_table
from unidiff_sdk.inference.manifest import DEFAULT_SAMPLER
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from unidiff_sdk.training.data.batches import Pairs, group_keys, load_pairs, tokenize
from unidiff_sdk.training.data.images import Pictures
from unidiff_sdk.training.objective.joint_model import JointModel
from unidiff_sdk.training.runtime.processes import pick_device

from . import metrics
from .judge import Judge, attribute_accuracy

__all__ = [
    "Evaluation",
    "differing",
    "embed",
    "equal_keys",
    "evaluate",
    "generate",
    "meanings",
    "retrieval",
    "synthetic_attributes",
]

EMBED_BATCH, GENERATE_BATCH = 64, 32
SHEET_COLUMNS = 10
RECALL_AT = (1, 5, 10)

Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """figures: nested, JSON-serialisable. sheet: the first generated pictures side by side. bad: rows passed over."""

    figures: dict[str, Any]
    sheet: Image.Image | None
    bad: list[InvalidRow]


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
    train_data: str | Path | None = None,
    base: str | Path | None = None,
    base_data: str | Path | None = None,
    device: str = "auto",
    strict: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Evaluation:
    """Measure `checkpoint` (a folder or "tiny") on the catalog folder `data`.

    prompts: generate for the first so many captions that differ in meaning, `per_prompt` pictures each; 0 measures
    retrieval alone. sampler, steps, guidance: default to the checkpoint's own, as a distilled one has them; where it
    names none, 20 steps of dpm++2m at a scale of 5. train_data: what the checkpoint was tuned on, to see whether
    pictures are copies. base and base_data: the checkpoint before tuning and data that it knows, to see what was
    forgotten. limit: the first so many pairs.

    Raises DataError, CheckpointError and OptionError for what it is given.
    """
    bad_settings = (steps is not None and steps < 1) or (guidance is not None and guidance < 0)
    if prompts < 0 or per_prompt < 1 or bad_settings or seed < 0:
        raise OptionError("prompts, guidance and seed must not be negative; per_prompt and steps must be above zero")
    if (base is None) != (base_data is None):
        raise OptionError("what was forgotten needs both base and base_data")

    # 1. retrieval
    on_stage("reading the checkpoint and the data")
    loaded = load_checkpoint(checkpoint)
    pairs = load_pairs(data, loaded, limit=limit, strict=strict)
    if len(pairs) < 2:
        raise OptionError(f"{data} holds a single usable pair: retrieval needs at least two")
    model = JointModel(loaded).to(pick_device(device)).eval()
    on_stage("retrieval")
    attributes = synthetic_attributes(pairs)
    u, v = embed(model, loaded, pairs)
    used = {"name": Path(data).name, "pairs": len(pairs), "bad_rows": len(pairs.bad), "sha256": pairs.fingerprint()}
    figures: dict[str, Any] = {
        "checkpoint": loaded.meta.get("name", loaded.path.name),
        "data": used,
        "relevance": "attributes" if attributes else "captions",
        "retrieval": retrieval(u, v, meanings(pairs, attributes)),
        "collapse": {
            "image_effective_rank": metrics.effective_rank(u),
            "text_effective_rank": metrics.effective_rank(v),
            "image_mean_cosine": metrics.mean_pairwise_cosine(u),
            "text_mean_cosine": metrics.mean_pairwise_cosine(v),
        },
    }

    # 2. generation
    sheet = None
    if prompts:
        rows = differing(meanings(pairs, attributes), prompts)
        asked = [row for row in rows for _ in range(per_prompt)]
        captions = [pairs.captions[row] for row in asked]
        named = DEFAULT_SAMPLER | loaded.meta.get("sampler", {})
        sampler = named["name"] if sampler is None else sampler
        steps = named["steps"] if steps is None else steps
        guidance = named["guidance_scale"] if guidance is None else guidance
        table = make_table(sampler, Schedule.from_config(loaded.scheduler.config), steps)
        pictures = generate(model, loaded, captions, table=table, guidance=guidance, seed=seed, on_stage=on_stage)
        on_stage("judging")
        judge = Judge.load()
        real, made = judge.features(_arrays(pairs.images)), judge.features(pictures)
        settings = {"prompts": len(rows), "per_prompt": per_prompt, "sampler": sampler}
        figures["generation"] = settings | {"steps": steps, "guidance": guidance, "seed": seed}
        # The judge has seen synthetic pictures only: on other data, its distances compare runs but mean little alone.
        figures["generation"] |= {"judge": judge.record["sha256"], "judge_knows_data": attributes is not None}
        figures["generation"] |= _distances(made, real, seed)
        if attributes:
            figures["generation"]["attribute_accuracy"] = attribute_accuracy(
                judge.attributes(pictures), [attributes[row] for row in asked]
            )
            figures["generation"]["attribute_accuracy_of_real"] = attribute_accuracy(
                judge.attributes(_arrays(pairs.images)), attributes
            )
        if per_prompt > 1:
            figures["collapse"]["per_prompt_diversity"] = metrics.per_prompt_diversity(made, asked)
        if train_data is not None:
            seen = judge.features(_arrays(load_pairs(train_data, loaded).images))
            figures["collapse"]["nearest_training_picture"] = {
                "generated": float(metrics.nearest_neighbor_similarity(made, seen)[0].mean()),
                "real": float(metrics.nearest_neighbor_similarity(real, seen)[0].mean()),
            }
        sheet = _sheet(pictures[: SHEET_COLUMNS * SHEET_COLUMNS])

    # 3. forgetting
    if base is not None and base_data is not None:
        on_stage("what was forgotten")
        figures["forgetting"] = _forgetting(model, loaded, base, base_data, limit, device)
    return Evaluation(figures, sheet, pairs.bad)


# --- retrieval -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(model: JointModel, checkpoint: Checkpoint, pairs: Pairs) -> tuple[Vectors, Vectors]:
    """Pictures and captions as CLIP sees them: (float32[n, d], float32[n, d]), unit rows."""
    device = model.alpha_bar.device
    images = [
        model.f(model.to_clip(chunk.to(device).float() / 255)).cpu() for chunk in pairs.clip_images.split(EMBED_BATCH)
    ]
    texts = [
        model.text_embeds(model.clip.text_model(ids.to(device)).pooler_output).cpu()
        for ids in tokenize(checkpoint.clip_tokenizer, pairs.captions).split(EMBED_BATCH)
    ]
    return torch.cat(images).numpy(), torch.cat(texts).numpy()


def retrieval(u: Vectors, v: Vectors, keys: Sequence[tuple[Any, ...]]) -> dict[str, dict[str, float]]:
    """R@1, R@5, R@10 and the median rank, both ways, of n pictures and their n captions; keys: n `meanings`."""
    relevant, similarity = equal_keys(keys), u @ v.T
    ways = {"text_to_image": similarity.T, "image_to_text": similarity}
    return {
        way: {f"R@{k}": share for k, share in metrics.recall_at_k(scores, relevant, RECALL_AT).items()}
        | {"median_rank": metrics.median_rank(scores, relevant)}
        for way, scores in ways.items()
    }


def equal_keys(keys: Sequence[tuple[Any, ...]]) -> NDArray[np.bool_]:
    """bool[n, n]: which of n keys are equal."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    group = np.array([numbers[key] for key in keys])
    return np.asarray(group[:, None] == group[None, :])


def synthetic_attributes(pairs: Pairs) -> list[dict[str, str]] | None:
    """Each product's attributes where all rows come from the synthetic catalogs, else None."""
    columns = [ATTRIBUTES.get(str(payload.get("catalog")), {}) for payload in pairs.payloads]
    if not all(names and set(names) <= set(row) for names, row in zip(columns, pairs.payloads, strict=True)):
        return None
    return [{name: str(row[name]) for name in names} for names, row in zip(columns, pairs.payloads, strict=True)]


def meanings(pairs: Pairs, attributes: list[dict[str, str]] | None) -> list[tuple[Any, ...]]:
    """What must be equal for a picture to be relevant to a caption: its attributes, else its normalized caption."""
    return [tuple(values.items()) for values in attributes] if attributes else group_keys(pairs)


def _forgetting(
    model: JointModel,
    tuned: Checkpoint,
    base: str | Path,
    base_data: str | Path,
    limit: int | None,
    device: str,
) -> dict[str, Any]:
    """Mean R@1 of both ways on what the base knows, before and after; positive drop: forgotten."""
    before_tuning = load_checkpoint(base)
    pairs = load_pairs(base_data, before_tuning, limit=limit)
    keys = meanings(pairs, synthetic_attributes(pairs))

    def mean_recall(model: JointModel, checkpoint: Checkpoint) -> float:
        ways = retrieval(*embed(model, checkpoint, pairs), keys)
        return float(np.mean([way["R@1"] for way in ways.values()]))

    before = mean_recall(JointModel(before_tuning).to(pick_device(device)).eval(), before_tuning)
    after = mean_recall(model, tuned)
    return {"data": Path(base_data).name, "R@1_base": before, "R@1_tuned": after, "drop": before - after}


# --- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: JointModel,
    checkpoint: Checkpoint,
    captions: Sequence[str],
    *,
    table: Table,
    guidance: float,
    seed: int,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[NDArray[np.uint8]]:
    """A picture uint8[h, w, 3] for each caption, by classifier-free guidance (Ho & Salimans 2022) along `table`.

    Picture i starts from noise that depends on (seed, i) alone.
    """
    device = model.alpha_bar.device
    side = int(checkpoint.unet.config.sample_size)
    shape = int(checkpoint.unet.config.in_channels), side, side
    empty = model.text_encoder(tokenize(checkpoint.tokenizer, [""]).to(device)).last_hidden_state
    pictures: list[NDArray[np.uint8]] = []
    for start in range(0, len(captions), GENERATE_BATCH):
        on_stage(f"generating {start}/{len(captions)}")
        chunk = captions[start : start + GENERATE_BATCH]
        states = model.text_encoder(tokenize(checkpoint.tokenizer, chunk).to(device)).last_hidden_state
        streams = [np.random.default_rng([seed, start + i]) for i in range(len(chunk))]
        x, x0 = _noise(streams, shape).to(device) * table.init_noise_sigma, None
        for step in range(len(table)):
            row = Coefficients(*map(float, table[step]))
            scaled, t = x * row.input_scale, torch.full((len(chunk),), row.timestep, device=device)
            output: Any = model.unet(scaled, t, states).sample
            if guidance != 1:
                unconditional = model.unet(scaled, t, empty.expand_as(states)).sample
                output = unconditional + guidance * (output - unconditional)
            fresh = _noise(streams, shape).to(device) if row.next_from_noise else None
            x, x0 = advance(row, x, output, x0, fresh)  # numpy's arithmetic is torch's here
        pixels = (model.decode(x).clamp(0, 1) * 255).round().to(torch.uint8)
        pictures += list(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return pictures


def _noise(streams: Sequence[np.random.Generator], shape: tuple[int, int, int]) -> Any:
    return torch.from_numpy(np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]))


def differing(keys: Sequence[tuple[Any, ...]], n: int) -> list[int]:
    """The first n rows whose keys differ."""
    first: dict[tuple[Any, ...], int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return list(first.values())[:n]


def _distances(made: Vectors, real: Vectors, seed: int) -> dict[str, float]:
    """KID and CMMD to the real pictures, and as their floor those of one random half of the real ones to the other."""
    half = np.random.default_rng(seed).permutation(len(real))
    a, b = real[half[: len(half) // 2]], real[half[len(half) // 2 :]]
    figures = {"kid": metrics.kid(made, real), "cmmd": metrics.cmmd(made, real)}
    if len(a) > 1:
        figures |= {"kid_floor": metrics.kid(a, b), "cmmd_floor": metrics.cmmd(a, b)}
    return figures


def _arrays(pictures: Pictures) -> Iterator[NDArray[np.uint8]]:
    for chunk in pictures.split(EMBED_BATCH):
        yield from chunk.permute(0, 2, 3, 1).numpy()


def _sheet(pictures: Sequence[NDArray[np.uint8]]) -> Image.Image:
    height, width = pictures[0].shape[:2]
    columns = min(SHEET_COLUMNS, len(pictures))
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (i % columns * width, i // columns * height))
    return sheet
