"""Training of encoders without a generator: CLIP by InfoNCE, SigLIP by the sigmoid loss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from click.testing import CliRunner  # noqa: E402
from support.processes import free_port  # noqa: E402
from support.siglip import SIZE, make_siglip  # noqa: E402
from transformers import CLIPModel, SiglipModel  # noqa: E402

from unidiff_sdk.errors import CheckpointError, OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.encoders.search_model import load_search_model  # noqa: E402
from unidiff_sdk.training.cli import train as command  # noqa: E402
from unidiff_sdk.training.config import PriorConfig, TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.batches import BatchLoader  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.evaluation.validation import Validator  # noqa: E402
from unidiff_sdk.training.loop.gradients import backpropagate  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.encoder_model import EncoderModel  # noqa: E402
from unidiff_sdk.training.objective.tuning import add_adapters, set_trainable  # noqa: E402
from unidiff_sdk.training.runtime.interrupts import InterruptedWithinStep  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402

ALONE = Processes(0, 1, torch.device("cpu"))
SEARCH = {"lambda_is": 0.0}
FEW = SEARCH | {"steps": 4, "batch_size": 6, "warmup_steps": 1, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip") / "published")


def first_step(base: Path, data: Path, **settings: object) -> tuple[EncoderModel, BatchLoader, dict[str, float]]:
    """The model with the gradients of its first step, the batches, and the values of the terms."""
    checkpoint, config = load_search_model(base), TrainingConfig(**SEARCH | settings)
    add_adapters(checkpoint, config)
    model = EncoderModel(checkpoint.model, checkpoint.normalization).train()
    set_trainable(model, config)
    pairs = load_pairs(data, checkpoint)
    ids = tokenize(checkpoint.tokenizer, pairs.captions)
    groups = range(len(pairs))  # as in the losses that are compared with, no two pairs have the same meaning
    batches = BatchLoader(model, pairs, ids, groups, size=config.batch_size, flip=config.flip, seed=0)
    empty = tokenize(checkpoint.tokenizer, [""])
    values = backpropagate(model, batches, config, step=0, empty_ids=empty, processes=ALONE)
    return model, batches, values


@pytest.mark.parametrize("micro", [0, 4], ids=["whole", "gradient-caching"])
def test_step_has_the_loss_and_the_gradients_of_transformers(siglip: Path, small_catalog: Path, micro: int) -> None:
    model, batches, values = first_step(siglip, small_catalog, batch_size=9, micro_batch=micro)
    theirs = SiglipModel.from_pretrained(siglip).train()
    batch = batches.load(batches.indices(0), 0)
    loss = theirs(input_ids=batch.input_ids, pixel_values=batch.clip_pixels, return_loss=True).loss
    loss.backward()
    assert values == {"itc": pytest.approx(loss.item(), rel=1e-5)}
    expected = {f"clip.{name}": p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() >= {"clip.logit_scale", "clip.logit_bias"}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-5, rtol=1e-4, msg=name)


def test_images_are_prepared_as_by_the_image_processor(siglip: Path, small_catalog: Path) -> None:
    """SigLIP squashes images; the training must not crop them."""
    from PIL import Image
    from transformers import AutoImageProcessor

    _, batches, _ = first_step(siglip, small_catalog, batch_size=12)
    indices = batches.indices(0)
    images = [Image.open(small_catalog / f"{row}.png") for row in indices.rows.tolist()]
    expected = AutoImageProcessor.from_pretrained(siglip)(images, return_tensors="pt").pixel_values
    torch.testing.assert_close(batches.load(indices, 0).clip_pixels, expected, atol=1e-5, rtol=0)


def test_run_saves_a_folder_of_transformers(siglip: Path, small_catalog: Path, tmp_path: Path) -> None:
    losses: list[dict[str, float]] = []
    config = TrainingConfig(**FEW, lambda_feature_distillation=0.1, flip=True)
    started: list[str] = []
    result = train(
        *(small_catalog, siglip, tmp_path / "tuned", config),
        device="cpu",
        on_step=lambda report: losses.append(report.losses),
        on_start=lambda model: started.append(model.describe_sharing()),
    )
    assert [set(each) for each in losses] == [{"itc", "feature_distillation"}] * 4 and "sigmoid loss" in started[0]
    base, tuned = (SiglipModel.from_pretrained(path).state_dict() for path in (siglip, result.path))
    assert base.keys() == tuned.keys()
    assert all(not torch.equal(base[name], tuned[name]) for name in ("logit_scale", "logit_bias"))
    model = load_search_model(result.path)
    assert (model.name, model.image_size, model.meta["base"]) == ("tuned", SIZE, "published")
    ids = [tokenize(load_search_model(path).tokenizer, ["A red dress!"]).tolist() for path in (siglip, result.path)]
    assert ids[0] == ids[1]
    card = (result.path / "README.md").read_text(encoding="utf-8")
    assert "SiglipModel.from_pretrained" in card and "Stable Diffusion" not in card and "published" in card


def test_temperature_of_siglip_is_not_clamped(siglip: Path, small_catalog: Path, tmp_path: Path) -> None:
    """Published models have scales of 117, above the bound of CLIP."""
    model = SiglipModel.from_pretrained(siglip)
    with torch.no_grad():
        model.logit_scale.fill_(4.77)
    base = make_siglip(tmp_path / "hot")
    model.save_pretrained(base)
    train(small_catalog, base, tmp_path / "tuned", TrainingConfig(**FEW), device="cpu")
    assert SiglipModel.from_pretrained(tmp_path / "tuned").logit_scale.item() > 4.7


def test_resumed_run_equals_an_uninterrupted_one(siglip: Path, small_catalog: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**FEW, save_every=2)

    def stop(report: object) -> None:
        if report.step == 3:
            raise InterruptedWithinStep

    train(small_catalog, siglip, tmp_path / "whole", config, device="cpu")
    with pytest.raises(InterruptedWithinStep):
        train(small_catalog, siglip, tmp_path / "parts", config, device="cpu", on_step=stop)
    train(small_catalog, siglip, tmp_path / "parts", config, device="cpu", resume=True)
    whole, parts = (SiglipModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_clip_without_a_generator_is_trained_as_with_one(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(**FEW)
    joint = train(small_catalog, random_checkpoint, tmp_path / "joint", config, device="cpu").path
    alone = train(small_catalog, random_checkpoint / "clip", tmp_path / "alone", config, device="cpu").path
    expected, found = load_checkpoint(joint).clip.state_dict(), CLIPModel.from_pretrained(alone).state_dict()
    base = load_checkpoint(random_checkpoint).clip.state_dict()
    assert any(not torch.equal(base[name], found[name]) for name in base)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)


def test_adapters_reach_every_layer_that_uses_them(siglip: Path, small_catalog: Path) -> None:
    """transformers reads the weights of the pooling attention itself, so an adapter there would learn nothing."""
    model, _, _ = first_step(siglip, small_catalog, batch_size=6, lora_text=2, lora_image=2)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    assert any(".head." in name for name in adapters if "text_model" in name)
    assert adapters and all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())


def test_validation_and_report_without_a_generator(siglip: Path, small_catalog: Path, tmp_path: Path) -> None:
    options = ["--is", 0, "--steps", 2, "--batch-size", 4, "--val", small_catalog, "--wise-ft"]
    call = [small_catalog, "--base", siglip, "-o", tmp_path / "tuned", "--device", "cpu", *options]
    result = CliRunner().invoke(command, list(map(str, call)))
    assert result.exit_code == 0, result.output
    assert f"unidiff-export --clip {tmp_path / 'tuned'}" in result.output and "unidiff-evaluate" not in result.output
    report = (tmp_path / "tuned.log" / "report.html").read_text(encoding="utf-8")
    assert "text → image, R@1" in report and "denoising" not in report and "Samples over time" not in report
    meta = json.loads((tmp_path / "tuned" / "unidiff.json").read_text(encoding="utf-8"))
    assert set(meta["chosen"]["wise_ft"]) == {"encoder"} and "denoising_loss" not in meta["validation"]["figures"]


def test_what_needs_a_generator_is_refused_by_name(siglip: Path, small_catalog: Path, tmp_path: Path) -> None:
    def run(config: TrainingConfig, **options: object) -> None:
        train(small_catalog, siglip, tmp_path / "tuned", config, device="cpu", **options)

    with pytest.raises(OptionError, match=r"published has no generator, but .* need one: lambda_is. Set"):
        run(TrainingConfig())
    few = TrainingConfig(**FEW)
    with pytest.raises(OptionError, match="Samples for prompts need a generator"):
        run(few, on_validate=Validator(small_catalog, prompts=["a red dress"]))
    with pytest.raises(OptionError, match="has no generator for images of prompts"):
        prior = PriorConfig(tmp_path / "prior", ("a dress",))
        run(TrainingConfig(**FEW, lambda_feature_distillation=1.0), prior=prior)
    with pytest.raises(CheckpointError, match="published has no generator, so LoRA files"):
        run(few, vae=siglip)
    with pytest.raises(CheckpointError, match=r"do_resize|shortest_edge|size .* is not supported"):
        run(TrainingConfig(**FEW, fit="pad"))
    with pytest.raises(CheckpointError, match=r"published has no generator\. .* unidiff-export --clip"):
        load_checkpoint(siglip)
    assert not (tmp_path / "tuned").exists()


RANK = """
import json, sys
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.loop.trainer import train

data, base, out, settings = sys.argv[1:]
train(data, base, out, TrainingConfig(**json.loads(settings)), device="cpu")
"""


def test_two_processes_train_like_one(siglip: Path, small_catalog: Path, tmp_path: Path) -> None:
    settings = FEW | {"batch_size": 9, "micro_batch": 2}
    train(small_catalog, siglip, tmp_path / "one", TrainingConfig(**settings), device="cpu")
    call = [sys.executable, "-c", RANK, small_catalog, siglip, tmp_path / "two", json.dumps(settings)]
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [
        subprocess.Popen(list(map(str, call)), env=shared | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors.decode()
    one, two = (SiglipModel.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    # The softmax of attention ignores the biases of keys. Their gradients are rounding, which AdamW scales up.
    for name in (name for name in one if not name.endswith(("k_proj.bias", "in_proj_bias"))):
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=1e-3, msg=name)
