"""Half precision and activations that are computed twice: the same step, within what each promises."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.errors import TrainingError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import Batches, group_keys, load_pairs, tokenize  # noqa: E402
from unidiff_sdk.training.loop.gradients import backpropagate  # noqa: E402
from unidiff_sdk.training.loop.learner import Learner  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.tuning import choose_trainable  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
SETTINGS = {"batch_size": 6, "rsc_t_max": 900, "rsc_warmup_steps": 0, "lambda_rsc_generated": 0.1, "warmup_steps": 0}


@pytest.fixture
def parts(random_checkpoint: Path, small_catalog: Path):
    """A function from settings to (learner, batches, tokens of the empty caption)."""

    def make(**settings: object) -> tuple[Learner, Batches, torch.Tensor]:
        config = TrainingConfig(**(SETTINGS | settings))
        checkpoint = load_checkpoint(random_checkpoint)
        model = JointModel(checkpoint, config.precision).train()
        choose_trainable(model, config)
        if config.checkpoint_activations:
            model.checkpoint_activations()
        pairs = load_pairs(small_catalog, checkpoint)
        ids = tokenize(checkpoint.tokenizer, pairs.captions)
        batches = Batches(model, pairs, ids, group_keys(pairs), size=config.batch_size, flip=False, seed=0)
        return Learner(model, config, ALONE), batches, tokenize(checkpoint.tokenizer, [""])

    return make


def test_activations_computed_twice_give_the_same_gradients_in_less_memory(parts) -> None:
    gradients, saved = [], []
    for twice in (False, True):
        learner, batches, empty_ids = parts(checkpoint_activations=twice)
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            backpropagate(
                learner.model,
                batches,
                learner.config,
                step=0,
                empty_ids=empty_ids,
                teacher=None,
                processes=ALONE,
            )
        gradients.append({name: p.grad for name, p in learner.trainable.items() if p.grad is not None})
        saved.append(sum(kept.values()))
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-6, rtol=1e-5)
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_takes_nearly_the_same_step(parts, precision: str) -> None:
    """fp16 on the CPU is slow, and the same arithmetic as on a GPU."""
    steps = {}
    for name in ("fp32", precision):
        learner, batches, empty_ids = parts(precision=name)
        if name == "fp16":
            learner.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        values = learner.step(0, batches, empty_ids)
        steps[name] = values, {key: p.grad.clone() for key, p in learner.trainable.items() if p.grad is not None}
    (values, gradients), (half_values, half_gradients) = steps.values()
    assert half_values == pytest.approx(values, rel=0.05)
    flat, half_flat = (torch.cat([g[key].flatten() for key in gradients]) for g in (gradients, half_gradients))
    assert torch.cosine_similarity(flat, half_flat, dim=0) > 0.98
    assert all(p.dtype == torch.float32 for p in learner.trainable.values())


def test_a_loss_scale_that_overflows_is_lowered_until_it_does_not(parts) -> None:
    learner, batches, empty_ids = parts(precision="fp16")
    before = {name: p.detach().clone() for name, p in learner.trainable.items()}
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    learner.step(0, batches, empty_ids)
    assert learner.scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in learner.trainable.items()), "the step was skipped"
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    learner.step(0, batches, empty_ids)
    assert not all(torch.equal(p, before[name]) for name, p in learner.trainable.items())


def test_gradients_that_overflow_without_scaling_stop_the_run(parts) -> None:
    learner, batches, empty_ids = parts(precision="fp16", lambda_is=1e6)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(TrainingError, match="step 1 is not finite"):
        learner.step(0, batches, empty_ids)
