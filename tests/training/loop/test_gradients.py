"""Gradients of a step: independent of micro-batches and processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from support.processes import free_port  # noqa: E402
from support.training_step import prepare_step  # noqa: E402

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import BatchLoader  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective import losses  # noqa: E402
from unidiff_sdk.training.objective.batch import RandomInputs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.terms import joint_losses  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, seeded_generator  # noqa: E402

EVERYTHING = {
    "lambda_rsc_encoder": 0.3,
    "lambda_rsc_generator": 0.6,
    "lambda_rsc_reward": 0.2,
    "rsc_reward_captions": 3,
    "rsc_reward_steps": 2,
    "lambda_feature_distillation": 0.4,
    "rsc_captions": 3,
    "caption_dropout": 0.3,
    "flip": True,
}
ROUNDING = 2.5e-7  # of a term in fp32: two units in the last place of the cosines near 1 that it is made of
TERMS = (
    "lambda_itc",
    "lambda_is",
    "lambda_rsc_encoder",
    "lambda_rsc_generator",
    "lambda_rsc_reward",
    "lambda_feature_distillation",
)
STEP = 10_000  # after the warm-up


def gradients(base: Path, data: Path, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of one step by parameter, and the values of its terms."""
    config = TrainingConfig(**settings)
    # At the base itself, feature distillation has no gradient.
    disturbed = config.lambda_feature_distillation > 0
    return prepare_step(base, data, config, disturbed=disturbed).backpropagate(STEP)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    # fp32 rounds a sum relative to its largest addends, so the tolerance follows the largest gradient of the step.
    largest = max(gradient.abs().max().item() for gradient in a.values())
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-5 * max(1.0, largest), rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_whole_batch_has_the_gradients_of_the_plain_sum(small_catalog: Path, random_checkpoint: Path) -> None:
    """Compared with one graph from the images to the weighted sum, differentiated at once."""
    of_no_single_forward_pass = ("lambda_rsc_encoder", "lambda_rsc_generator", "lambda_rsc_reward")
    everything = EVERYTHING | dict.fromkeys(of_no_single_forward_pass, 0.0)
    config = TrainingConfig(**everything, batch_size=9)
    prepared = prepare_step(random_checkpoint, small_catalog, config, disturbed=True)
    model, batches = prepared.model, prepared.batches
    noise = seeded_generator(config.seed, Purpose.NOISE, STEP)
    random = RandomInputs.sample(noise, 9, model.latent_shape, len(model.timesteps), config, pairs=9)
    batch = batches.load(batches.indices(STEP), 9)
    terms = joint_losses(model, batch, config, random=random, empty_ids=prepared.empty_ids, step=STEP)
    sum(weight * value for weight, value in terms.values()).backward()
    ours, values = gradients(random_checkpoint, small_catalog, **everything, batch_size=9)
    assert_equal(ours, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert values == pytest.approx({name: value.item() for name, (_, value) in terms.items()}, rel=1e-5)


@pytest.mark.parametrize("batch", [{"batch_size": 9}, {"batch_size": 4, "contrastive_batch": 11}], ids=["9", "4-of-11"])
@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_have_the_gradients_of_the_whole_batch(
    small_catalog: Path, random_checkpoint: Path, batch: dict, micro: int
) -> None:
    whole, values = gradients(random_checkpoint, small_catalog, **EVERYTHING, **batch)
    parts, others = gradients(random_checkpoint, small_catalog, **EVERYTHING, **batch, micro_batch=micro)
    assert_equal(parts, whole)
    assert others == pytest.approx(values, rel=1e-5, abs=ROUNDING)


@pytest.mark.parametrize(
    "term",
    [
        *("lambda_itc", "lambda_is"),
        *("lambda_rsc_encoder", "lambda_rsc_generator", "lambda_rsc_reward"),
    ],
)
def test_micro_batches_have_the_gradients_of_each_single_term(
    small_catalog: Path, random_checkpoint: Path, term: str
) -> None:
    settings = EVERYTHING | dict.fromkeys(TERMS, 0.0) | {term: 1.0, "batch_size": 6}
    whole, _ = gradients(random_checkpoint, small_catalog, **settings)
    parts, _ = gradients(random_checkpoint, small_catalog, **settings, micro_batch=2)
    assert_equal(parts, whole)


def test_contrastive_batch_larger_than_the_unet_batch(small_catalog: Path, random_checkpoint: Path) -> None:
    """ITC of 11 pairs computed by hand, while 4 of them pass through the UNet."""
    config = TrainingConfig(batch_size=4, contrastive_batch=11)
    prepared = prepare_step(random_checkpoint, small_catalog, config, disturbed=False)
    model, batches = prepared.model, prepared.batches
    batch = batches.load(batches.indices(STEP), 4)
    with torch.no_grad():
        u, v = model.f(batch.clip_pixels), model.text_embeds(model.clip.text_model(batch.input_ids).pooler_output)
        expected = losses.itc(u, v, model.clip.logit_scale, losses.same_meaning(batch.groups, batch.groups))
    settings = {"batch_size": 4, "contrastive_batch": 11, "micro_batch": 4}
    _, values = gradients(random_checkpoint, small_catalog, **settings)
    assert len(batch) == 11 and values["itc"] == pytest.approx(expected.item(), rel=1e-5)


class RecordingLoader(BatchLoader):
    """Records the sizes of the batches that it loads."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.sizes: list[tuple[int, int]] = []

    def load(self, *arguments):
        batch = super().load(*arguments)
        self.sizes.append((len(batch), len(batch.latents)))
        return batch


def test_one_micro_batch_is_in_memory_at_a_time(small_catalog: Path, random_checkpoint: Path) -> None:
    config = TrainingConfig(batch_size=4, contrastive_batch=11, micro_batch=3)
    step = prepare_step(random_checkpoint, small_catalog, config, loader=RecordingLoader)
    step.backpropagate()
    assert step.batches.sizes == 2 * [(3, 3), (3, 1), (3, 0), (2, 0)], "once for the embeddings, once with a graph"


# --- several processes -----------------------------------------------------------------------------------------------

RANK = """
import json, sys
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.loop.trainer import train

data, base, out, settings, losses = sys.argv[1:]
reports = []
train(data, base, out, TrainingConfig(**json.loads(settings)), device="cpu", on_step=lambda r: reports.append(r.losses))
if reports:  # only the main process reports
    with open(losses, "x") as file:
        json.dump(reports, file)
"""


def test_two_processes_train_like_one(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """Two processes over gloo that share an odd batch have the losses and weights of a single process."""
    settings = EVERYTHING | {
        "steps": 3,
        "batch_size": 5,
        "contrastive_batch": 9,
        "hard_negatives": 2,
        "micro_batch": 2,
        "warmup_steps": 1,
        "rsc_warmup_steps": 1,
    }
    reports: list[dict[str, float]] = []
    config = TrainingConfig(**settings)
    one = tmp_path / "one"
    train(small_catalog, random_checkpoint, one, config, device="cpu", on_step=lambda r: reports.append(r.losses))

    two, file = tmp_path / "two", tmp_path / "losses.json"
    command = [sys.executable, "-c", RANK, small_catalog, random_checkpoint, two, json.dumps(settings), file]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(
            list(map(str, command)), env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE
        )
        for rank in ("0", "1")
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors.decode()
    for ours, theirs in zip(json.loads(file.read_text(encoding="utf-8")), reports, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=ROUNDING)
    a, b = (JointModel(load_checkpoint(path)).state_dict() for path in (one, two))
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-4, rtol=1e-3)
