"""The gradients of a step: the same however its batch is cut into parts and spread over processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import Batches, group_keys, load_pairs, tokenize  # noqa: E402
from unidiff_sdk.training.loop.gradients import backpropagate  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective import losses  # noqa: E402
from unidiff_sdk.training.objective.joint_model import Draws, JointModel, joint_losses  # noqa: E402
from unidiff_sdk.training.objective.tuning import choose_trainable  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402
from unidiff_sdk.training.runtime.randomness import Purpose, generator  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
EVERYTHING = {
    "lambda_rsc": 0.3,
    "lambda_rsc_generated": 0.5,
    "lambda_rsc_feature": 0.2,
    "lambda_leash": 0.4,
    "rsc_t_max": 800,
    "rsc_samples": 3,
    "caption_dropout": 0.3,
    "flip": True,
}
ROUNDING = 2.5e-7  # of a term in fp32: two units in the last place of the cosines near 1 that it is made of
TERMS = ("lambda_itc", "lambda_is", "lambda_rsc", "lambda_rsc_generated", "lambda_rsc_feature", "lambda_leash")
STEP = 10_000  # long after the warm-up


def gradients(base: Path, data: Path, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Of one step, by parameter; and the terms' values."""
    config = TrainingConfig(**settings)
    model, batches, empty_ids = prepare(base, data, config)
    values = backpropagate(model, batches, config, step=STEP, empty_ids=empty_ids, teacher=None, processes=ALONE)
    return collect(model), values


def prepare(base: Path, data: Path, config: TrainingConfig) -> tuple[JointModel, Batches, torch.Tensor]:
    checkpoint = load_checkpoint(base)
    model = JointModel(checkpoint).train()
    choose_trainable(model, config)
    pairs = load_pairs(data, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    size = max(config.batch_size, config.contrastive_batch)
    leash = config.lambda_leash > 0
    batches = Batches(model, pairs, ids, group_keys(pairs), size=size, flip=config.flip, seed=config.seed, leash=leash)
    if leash:  # at the base itself it pulls nowhere
        disturb(model)
    return model, batches, tokenize(checkpoint.tokenizer, [""])


def disturb(model: JointModel) -> None:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.clip.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=random)


def collect(model: JointModel) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and a
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_whole_batch_has_the_gradients_of_the_plain_sum(small_catalog: Path, random_checkpoint: Path) -> None:
    """Against one graph from the pictures to the weighted sum, differentiated at once."""
    config = TrainingConfig(**EVERYTHING, batch_size=9)
    model, batches, empty_ids = prepare(random_checkpoint, small_catalog, config)
    noise = generator(config.seed, Purpose.NOISE, STEP)
    draws = Draws.of(noise, 9, batches.latent_shape, len(model.alpha_bar), config, pairs=9)
    batch = batches.load(batches.choose(STEP), 9)
    terms = joint_losses(model, batch, config, draws=draws, empty_ids=empty_ids, step=STEP)
    sum(weight * value for weight, value in terms.values()).backward()
    ours, values = gradients(random_checkpoint, small_catalog, **EVERYTHING, batch_size=9)
    assert_equal(ours, collect(model))
    assert values == pytest.approx({name: value.item() for name, (_, value) in terms.items()}, rel=1e-5)


@pytest.mark.parametrize("batch", [{"batch_size": 9}, {"batch_size": 4, "contrastive_batch": 11}], ids=["9", "4-of-11"])
@pytest.mark.parametrize("micro", [1, 3, 5])
def test_parts_of_a_batch_have_the_gradients_of_the_whole(
    small_catalog: Path, random_checkpoint: Path, batch: dict, micro: int
) -> None:
    whole, values = gradients(random_checkpoint, small_catalog, **EVERYTHING, **batch)
    parts, others = gradients(random_checkpoint, small_catalog, **EVERYTHING, **batch, micro_batch=micro)
    assert_equal(parts, whole)
    assert others == pytest.approx(values, rel=1e-5, abs=ROUNDING)


@pytest.mark.parametrize(
    "term", ["lambda_itc", "lambda_is", "lambda_rsc", "lambda_rsc_generated", "lambda_rsc_feature"]
)
def test_each_term_alone_survives_the_cutting(small_catalog: Path, random_checkpoint: Path, term: str) -> None:
    settings = EVERYTHING | dict.fromkeys(TERMS, 0.0) | {term: 1.0, "batch_size": 6}
    whole, _ = gradients(random_checkpoint, small_catalog, **settings)
    parts, _ = gradients(random_checkpoint, small_catalog, **settings, micro_batch=2)
    assert_equal(parts, whole)


def test_the_contrast_is_over_the_larger_batch(small_catalog: Path, random_checkpoint: Path) -> None:
    """ITC of 11 pairs by hand, while 4 of them go through the UNet."""
    config = TrainingConfig(batch_size=4, contrastive_batch=11, lambda_rsc=0.0)
    model, batches, _ = prepare(random_checkpoint, small_catalog, config)
    batch = batches.load(batches.choose(STEP), 4)
    with torch.no_grad():
        u, v = model.f(batch.clip_pixels), model.text_embeds(model.clip.text_model(batch.input_ids).pooler_output)
        expected = losses.itc(u, v, model.clip.logit_scale, losses.same_meaning(batch.groups, batch.groups))
    settings = {"batch_size": 4, "contrastive_batch": 11, "lambda_rsc": 0.0, "micro_batch": 4}
    _, values = gradients(random_checkpoint, small_catalog, **settings)
    assert len(batch) == 11 and values["itc"] == pytest.approx(expected.item(), rel=1e-5)


def test_only_a_part_is_in_memory_at_a_time(
    small_catalog: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(batch_size=4, contrastive_batch=11, micro_batch=3, lambda_rsc=0.0)
    model, batches, empty_ids = prepare(random_checkpoint, small_catalog, config)
    seen: list[tuple[int, int]] = []
    load = batches.load

    def spy(*arguments):
        batch = load(*arguments)
        seen.append((len(batch), len(batch.latents)))
        return batch

    monkeypatch.setattr(batches, "load", spy)
    backpropagate(model, batches, config, step=0, empty_ids=empty_ids, teacher=None, processes=ALONE)
    assert seen == 2 * [(3, 3), (3, 1), (3, 0), (2, 0)], "once for the embeddings, once with a graph"


# --- several processes -----------------------------------------------------------------------------------------------

RANK = """
import json, sys
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.loop.trainer import train

data, base, out, settings, losses = sys.argv[1:]
reports = []
train(data, base, out, TrainingConfig(**json.loads(settings)), device="cpu", on_step=lambda r: reports.append(r.losses))
if reports:  # the main process alone reports
    with open(losses, "x") as file:
        json.dump(reports, file)
"""


def test_two_processes_train_as_one(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    """Two real processes over gloo, an odd batch between them: the losses and the weights of a single process."""
    settings = EVERYTHING | {
        "steps": 3,
        "batch_size": 5,
        "contrastive_batch": 9,
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


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])
