"""Hard negatives: which images a caption brings, how batches are filled, and bit-equal resuming."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from unidiff_sdk.errors import CheckpointError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.hard_negatives import HardNegatives  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402

SETTINGS = {
    "steps": 5,
    "batch_size": 6,
    "hard_negatives": 2,
    "lambda_is": 0.0,
    "learning_rate": 1e-3,
}


@settings(max_examples=60, deadline=None)
@given(
    pairs=st.integers(2, 30), per_pair=st.integers(1, 4), size=st.integers(2, 12), meanings=st.integers(1, 6),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_batches_hold_the_nearest_images_of_other_meaning(
    pairs: int, per_pair: int, size: int, meanings: int, seed: int
) -> None:
    """Compared with a sort by hand: each pair is followed by its nearest images that the batch does not hold yet."""
    size = min(size, pairs)
    generator = torch.Generator().manual_seed(seed)
    u, v = (F.normalize(torch.randn(pairs, 6, generator=generator), dim=1) for _ in range(2))
    groups = torch.randint(0, meanings, (pairs,), generator=generator)
    negatives = HardNegatives(per_pair, size, pairs)
    negatives.nearest = negatives.find(u, v, groups)
    anchors = torch.randperm(pairs, generator=generator)[: negatives.anchors]
    rows = negatives.rows(anchors, torch.randperm(pairs, generator=generator)).tolist()
    assert len(rows) == len(set(rows)) == size

    nearest = {
        i: sorted((j for j in range(pairs) if groups[j] != groups[i]), key=lambda j, i=i: -float(v[i] @ u[j]))[
            : 4 * per_pair
        ]
        for i in range(pairs)
    }
    chosen: list[int] = []
    for anchor in anchors.tolist():
        chosen += [] if anchor in chosen else [anchor]
        chosen += [j for j in nearest[anchor] if j not in chosen][:per_pair]
    assert rows[: len(chosen)] == chosen[:size]


def test_every_pair_brings_its_negatives_once_an_epoch(small_catalog: Path, random_checkpoint: Path) -> None:
    from support.training_step import ALONE, prepare_step

    config = TrainingConfig(**SETTINGS)
    batches = prepare_step(random_checkpoint, small_catalog, config).batches
    assert batches.negatives is not None and batches.negatives.anchors == 2
    batches.refresh_negatives(0, ALONE)
    first = [batches.indices(step).rows[0].item() for step in range(len(batches.input_ids) // 2)]
    assert len(set(first)) == len(first)


def test_negatives_are_found_anew_as_the_encoder_learns(small_catalog: Path, random_checkpoint: Path) -> None:
    from support.training_step import ALONE, disturb, prepare_step

    prepared = prepare_step(random_checkpoint, small_catalog, TrainingConfig(**SETTINGS))
    batches = prepared.batches
    batches.refresh_negatives(0, ALONE)
    before = batches.negatives.nearest
    disturb(prepared.model)
    batches.refresh_negatives(1, ALONE)
    assert batches.negatives.nearest is before, "not due"
    batches.refresh_negatives(batches.negatives.interval, ALONE)
    assert not torch.equal(batches.negatives.nearest, before)


def test_resumed_run_is_bit_equal(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """The batches of the steps after an interrupt depend on negatives found before it."""
    config = TrainingConfig(**SETTINGS)
    train(small_catalog, random_checkpoint, tmp_path / "whole", config, device="cpu")

    def interrupt(report) -> None:
        if report.step == 3:
            os.kill(os.getpid(), 2)

    with pytest.raises(KeyboardInterrupt):
        train(small_catalog, random_checkpoint, tmp_path / "parts", config, device="cpu", on_step=interrupt)
    train(small_catalog, random_checkpoint, tmp_path / "parts", config, device="cpu", resume=True)
    a, b = (load_checkpoint(tmp_path / name).clip.state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hard_negatives.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="Cannot resume"):
        HardNegatives(2, 6, 20).restore(tmp_path)
