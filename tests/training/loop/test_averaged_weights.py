"""The averaged weights follow their update rule and get no gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from support.training_step import ALONE, prepare_step  # noqa: E402

from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.learner import Learner  # noqa: E402


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_averaged_weights_follow_their_update_rule(small_catalog: Path, random_checkpoint: Path) -> None:
    """w̄ ← d·w̄ + (1-d)·w with d = min(decay, (1 + k)/(10 + k)), computed by hand."""
    config = TrainingConfig(batch_size=6, learning_rate=1e-2, warmup_steps=0, ema_decay=0.3)
    prepared = prepare_step(random_checkpoint, small_catalog, config)
    learner = Learner(prepared.model, config, ALONE)
    averaged = snapshot(learner.model)
    for step in range(3):
        learner.step(step, prepared.batches, prepared.empty_ids)
        decay = min(0.3, (2 + step) / (11 + step))
        now = snapshot(learner.model)
        averaged = {name: decay * averaged[name] + (1 - decay) * now[name] for name in now}
        for name, weight in learner.ema.weights.items():
            torch.testing.assert_close(weight, averaged[name], atol=1e-6, rtol=1e-5, msg=name)
            assert not weight.requires_grad and weight.grad is None
