"""RSC's teacher: the frozen one never moves, the averaged one by its rule alone, and neither is ever taught."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import Batches, group_keys, load_pairs, tokenize  # noqa: E402
from unidiff_sdk.training.loop.learner import Learner  # noqa: E402
from unidiff_sdk.training.objective.joint_model import Draws, JointModel, joint_losses  # noqa: E402
from unidiff_sdk.training.objective.tuning import add_adapters, choose_trainable  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, generator  # noqa: E402

SETTINGS = {"batch_size": 6, "learning_rate": 1e-2, "warmup_steps": 0, "rsc_warmup_steps": 0, "rsc_t_max": 999}


def start(base: Path, data: Path, **settings: object) -> tuple[Learner, Batches, torch.Tensor]:
    config = TrainingConfig(**(SETTINGS | settings))
    checkpoint = load_checkpoint(base)
    add_adapters(checkpoint, config)
    model = JointModel(checkpoint).train()
    choose_trainable(model, config)
    pairs = load_pairs(data, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    batches = Batches(model, pairs, ids, group_keys(pairs), size=config.batch_size, flip=False, seed=0)
    learner = Learner(model, config, Processes(0, 1, torch.device("cpu")))
    return learner, batches, tokenize(checkpoint.tokenizer, [""])


def rsc(learner: Learner, batches: Batches, empty: torch.Tensor, step: int, teacher: dict | None) -> float:
    """The term of a step with this teacher, its whole batch in one piece."""
    model, config = learner.model, learner.config
    noise = generator(config.seed, Purpose.NOISE, step)
    draws = Draws.of(noise, 6, batches.latent_shape, len(model.alpha_bar), config, pairs=6)
    batch = batches.load(batches.choose(step), 6)
    with torch.no_grad():
        terms = joint_losses(model, batch, config, draws=draws, empty_ids=empty, step=step, teacher=teacher)
    return float(terms["rsc"][1])


def snapshot(model: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(prefix)}


@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapters"])
def test_a_frozen_teacher_is_the_base_however_far_the_encoder_goes(
    small_catalog: Path, random_checkpoint: Path, rank: int
) -> None:
    learner, batches, empty = start(random_checkpoint, small_catalog, rsc_teacher="frozen", lora_image=rank)
    base = snapshot(learner.model, "clip.vis")
    for step in range(3):
        expected = rsc(learner, batches, empty, step, base)
        if step:  # the encoder has moved, so another teacher would say something else
            assert abs(rsc(learner, batches, empty, step, None) - expected) > 1e-5
        assert learner.step(step, batches, empty)["rsc"] == pytest.approx(expected, rel=1e-5)
    assert learner.frozen_teacher and all(torch.equal(t, base[name]) for name, t in learner.frozen_teacher.items())
    assert not any(tensor.requires_grad for tensor in learner.frozen_teacher.values())
    moved = snapshot(learner.model, "clip.vis")
    assert any(not torch.equal(moved[name], base[name]) for name in base)


def test_an_averaged_teacher_moves_by_its_rule_alone(small_catalog: Path, random_checkpoint: Path) -> None:
    """w̄ ← d·w̄ + (1-d)·w with d = min(decay, (1 + k)/(10 + k)), by hand beside the run; it is what RSC asks."""
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
def test_a_step_with_nothing_under_the_gate_is_finite(
    small_catalog: Path, random_checkpoint: Path, teacher: str
) -> None:
    """Of every variant, for every teacher; and where RSC is all there is, nothing moves but by weight decay."""
    only = {
        "lambda_itc": 0.0,
        "lambda_is": 0.0,
        "lambda_rsc": 1.0,
        "lambda_rsc_generated": 1.0,
        "lambda_rsc_feature": 1.0,
    }
    settings = only | {"rsc_teacher": teacher, "rsc_t_max": 0, "weight_decay": 0.0}
    learner, batches, empty = start(random_checkpoint, small_catalog, **settings)
    before = snapshot(learner.model)
    values = learner.step(0, batches, empty)
    assert values == {"rsc": 0.0, "rsc_generated": 0.0, "rsc_feature": 0.0}
    after = snapshot(learner.model)
    assert all(torch.equal(after[name], before[name]) for name in before)
