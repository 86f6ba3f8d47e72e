"""RSC's teacher: the frozen one never changes, the averaged one follows its rule, and neither gets gradients."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from support.training_step import ALONE, prepare_step  # noqa: E402

from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import BatchLoader  # noqa: E402
from unidiff_sdk.training.loop.learner import Learner  # noqa: E402
from unidiff_sdk.training.objective.batch import RandomInputs  # noqa: E402
from unidiff_sdk.training.objective.terms import joint_losses  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator  # noqa: E402

SETTINGS = {"batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0, "rsc_warmup_steps": 0, "rsc_t_max": 999}


def start(base: Path, data: Path, **settings: object) -> tuple[Learner, BatchLoader, torch.Tensor]:
    step = prepare_step(base, data, TrainingConfig(**(SETTINGS | settings)))
    return Learner(step.model, step.config, ALONE), step.batches, step.empty_ids


def rsc(learner: Learner, batches: BatchLoader, empty: torch.Tensor, step: int, teacher: dict | None) -> float:
    """Value of RSC pixel in a step with this teacher, with the whole batch in one piece."""
    model, config = learner.model, learner.config
    noise = seeded_generator(config.seed, Purpose.NOISE, step)
    random = RandomInputs.sample(noise, 6, model.latent_shape, model.timesteps, config, pairs=6)
    batch = batches.load(batches.indices(step), 6)
    with torch.no_grad():
        terms = joint_losses(model, batch, config, random=random, empty_ids=empty, step=step, teacher=teacher)
    return float(terms["rsc"][1])


def snapshot(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapters"])
def test_frozen_teacher_stays_the_base(small_catalog: Path, random_checkpoint: Path, rank: int) -> None:
    learner, batches, empty = start(random_checkpoint, small_catalog, rsc_teacher="frozen", lora_image=rank)
    base = snapshot(learner.model, "clip.vis")
    for step in range(3):
        expected = rsc(learner, batches, empty, step, base)
        if step:  # the encoder has changed, so the tuned teacher gives another value
            assert abs(rsc(learner, batches, empty, step, None) - expected) > 1e-5
        assert learner.step(step, batches, empty)["rsc"] == pytest.approx(expected, rel=1e-5)
    assert learner.frozen_teacher and all(torch.equal(t, base[name]) for name, t in learner.frozen_teacher.items())
    assert not any(tensor.requires_grad for tensor in learner.frozen_teacher.values())
    tuned = snapshot(learner.model, "clip.vis")
    assert any(not torch.equal(tuned[name], base[name]) for name in base)


def test_averaged_teacher_follows_its_update_rule(small_catalog: Path, random_checkpoint: Path) -> None:
    """w̄ ← d·w̄ + (1-d)·w with d = min(decay, (1 + k)/(10 + k)), computed by hand; RSC uses these weights."""
    learner, batches, empty = start(random_checkpoint, small_catalog, rsc_teacher="ema", ema_decay=0.3)
    averaged = snapshot(learner.model)
    for step in range(3):
        expected = rsc(learner, batches, empty, step, averaged)
        assert learner.step(step, batches, empty)["rsc"] == pytest.approx(expected, rel=1e-5)
        decay = min(0.3, (2 + step) / (11 + step))
        now = snapshot(learner.model)
        averaged = {name: decay * averaged[name] + (1 - decay) * now[name] for name in now}
        for name, weight in learner.ema.weights.items():
            torch.testing.assert_close(weight, averaged[name], atol=1e-6, rtol=1e-5, msg=name)
            assert not weight.requires_grad and weight.grad is None
    assert abs(rsc(learner, batches, empty, 3, None) - rsc(learner, batches, empty, 3, averaged)) > 1e-6


@pytest.mark.parametrize("teacher", ["tuned", "ema", "frozen"])
def test_step_without_gated_samples_is_finite(small_catalog: Path, random_checkpoint: Path, teacher: str) -> None:
    """For every teacher. If RSC is the only term, no weight changes."""
    only = {"lambda_itc": 0.0, "lambda_is": 0.0, "lambda_rsc": 1.0}
    settings = only | {"rsc_teacher": teacher, "rsc_t_max": 0, "weight_decay": 0.0}
    learner, batches, empty = start(random_checkpoint, small_catalog, **settings)
    before = snapshot(learner.model)
    values = learner.step(0, batches, empty)
    assert values == {"rsc": 0.0}
    after = snapshot(learner.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
