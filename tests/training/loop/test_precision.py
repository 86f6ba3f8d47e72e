"""Half precision and activation checkpointing: the same step, within rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from support.training_step import ALONE, TrainingStep, prepare_step  # noqa: E402

from unidiff_sdk.errors import TrainingError  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.learner import Learner  # noqa: E402

SETTINGS = {"batch_size": 6, "warmup_steps": 0}


@pytest.fixture
def prepare(random_checkpoint: Path, small_catalog: Path):
    """A function from settings to a step and its learner."""

    def make(**settings: object) -> tuple[TrainingStep, Learner]:
        step = prepare_step(random_checkpoint, small_catalog, TrainingConfig(**(SETTINGS | settings)))
        return step, Learner(step.model, step.config, ALONE)

    return make


def test_activation_checkpointing_gives_the_same_gradients_in_less_memory(prepare) -> None:
    gradients, saved = [], []
    for checkpointing in (False, True):
        step, _ = prepare(checkpoint_activations=checkpointing)
        storages: dict[int, int] = {}

        def note(tensor: torch.Tensor, storages: dict[int, int] = storages) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            gradients.append(step.backpropagate()[0])
        saved.append(sum(storages.values()))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_almost_the_same_step(prepare, precision: str) -> None:
    """fp16 on the CPU is slow, but uses the same arithmetic as on a GPU."""
    steps = {}
    for name in ("fp32", precision):
        step, learner = prepare(precision=name)
        if name == "fp16":
            learner.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        values = learner.step(0, step.batches, step.empty_ids)
        steps[name] = values, {key: p.grad.clone() for key, p in learner.trainable.items() if p.grad is not None}
    (values, gradients), (half_values, half_gradients) = steps.values()
    assert half_values == pytest.approx(values, rel=0.05)
    flat, half_flat = (torch.cat([g[key].flatten() for key in gradients]) for g in (gradients, half_gradients))
    assert torch.cosine_similarity(flat, half_flat, dim=0) > 0.98
    assert all(p.dtype == torch.float32 for p in learner.trainable.values())


def test_loss_scale_that_overflows_is_lowered(prepare) -> None:
    step, learner = prepare(precision="fp16")
    before = {name: p.detach().clone() for name, p in learner.trainable.items()}
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    learner.step(0, step.batches, step.empty_ids)
    assert learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in learner.trainable.items()), "the step was skipped"
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    learner.step(0, step.batches, step.empty_ids)
    assert not all(torch.equal(p, before[name]) for name, p in learner.trainable.items())


def test_gradients_that_overflow_at_the_lowest_scale_stop_the_run(prepare) -> None:
    step, learner = prepare(precision="fp16", lambda_is=1e6)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(TrainingError, match="Step 1 is not finite"):
        learner.step(0, step.batches, step.empty_ids)
