"""The joint loss: the parts that each term trains, skipped computation, and an empty gate."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

import torch.nn.functional as F  # noqa: E402

from unidiff_sdk.errors import CheckpointError, OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.objective.batch import Batch, RandomInputs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.terms import joint_losses, term_weights  # noqa: E402

OFF = {"lambda_itc": 0.0, "lambda_is": 0.0}
PARTS = {
    "unet.": "unet",
    "vae.": "vae",
    "text_encoder.": "text tower",
    "clip.text_model.": "text tower",
    "clip.text_projection.": "text projection",
    "clip.vision_model.": "image tower",
    "clip.visual_projection.": "image tower",
    "clip.logit_scale": "temperature",
}
ENCODER = {"image tower", "text tower", "text projection", "temperature"}


@pytest.fixture
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


def run(checkpoint: Checkpoint, config: TrainingConfig, *, step: int = 10_000, n: int = 6, seed: int = 0):
    """One batch through the joint loss: (model, terms)."""
    torch.manual_seed(seed)
    model = JointModel(checkpoint, config.precision)
    captions = ["a red dress", "a blue shirt", "green boots", "a red dress", "a teal mug", "yellow trousers"][:n]
    batch = Batch(
        clip_pixels=model.to_clip(torch.rand(n, 3, 32, 32)),
        latents=torch.randn(n, 4, 16, 16),
        input_ids=tokenize(checkpoint.tokenizer, captions),
        groups=torch.tensor([0, 1, 2, 0, 4, 5])[:n],
    )
    empty_ids = tokenize(checkpoint.tokenizer, [""])
    random = RandomInputs.sample(
        torch.Generator().manual_seed(seed), n, (4, 16, 16), len(model.timesteps), config, pairs=n
    )
    return model, joint_losses(model, batch, config, random=random, empty_ids=empty_ids, step=step)


def trained_parts(model: JointModel) -> set[str]:
    """The parts with a gradient."""
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    return {part for name in reached for prefix, part in PARTS.items() if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("term", "parts"),
    [
        ({"lambda_itc": 1.0}, ENCODER),
        ({"lambda_is": 1.0}, {"unet", "text tower"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_each_term_trains_its_parts_only(checkpoint: Checkpoint, term: dict, parts: set[str]) -> None:
    model, terms = run(checkpoint, TrainingConfig(**(OFF | term)))
    assert len(terms) == 1
    ((weight, value),) = terms.values()
    (weight * value).backward()
    assert trained_parts(model) == parts


def test_separate_text_encoders_are_trained_separately(checkpoint: Checkpoint) -> None:
    separate = replace(checkpoint, text_encoder=deepcopy(checkpoint.text_encoder))
    assert not separate.shared
    model, terms = run(separate, TrainingConfig(**(OFF | {"lambda_itc": 1.0, "lambda_is": 1.0})))
    terms["itc"][1].backward()
    assert all(p.grad is None for p in model.text_encoder.parameters())
    model.zero_grad(set_to_none=True)
    terms["is"][1].backward()
    assert all(p.grad is None for p in model.clip.parameters())
    assert trained_parts(model) == {"unet", "text tower"}


def test_itc_term_is_the_formula_of_open_clip(checkpoint: Checkpoint) -> None:
    """ITC of a batch compared with open_clip's formula with SupCon targets."""
    config = TrainingConfig(**(OFF | {"lambda_itc": 0.7}))
    model, terms = run(checkpoint, config)
    torch.manual_seed(0)
    pixels = model.to_clip(torch.rand(6, 3, 32, 32))
    captions = ["a red dress", "a blue shirt", "green boots", "a red dress", "a teal mug", "yellow trousers"]
    output = checkpoint.clip(input_ids=tokenize(checkpoint.tokenizer, captions), pixel_values=pixels)
    target = torch.eye(6)
    target[[0, 0, 3, 3], [0, 3, 0, 3]] = 0.5
    expected = sum(F.cross_entropy(logits, target) for logits in (output.logits_per_image, output.logits_per_text)) / 2
    weight, value = terms["itc"]
    assert weight == 0.7
    torch.testing.assert_close(value, expected)


def test_rsc_weights_warm_up() -> None:
    config = TrainingConfig(lambda_rsc_reward=0.2, rsc_warmup_steps=100)
    assert [term_weights(config, step)["rsc_reward"] for step in (0, 50, 100)] == [0.0, 0.1, 0.2]


def count_calls(*modules: torch.nn.Module) -> list[int]:
    """A list that receives the batch size of each forward pass."""
    calls: list[int] = []
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    return calls


def test_inactive_terms_are_not_computed(checkpoint: Checkpoint) -> None:
    decoder, unet, tower = (
        count_calls(module) for module in (checkpoint.vae.decoder, checkpoint.unet, checkpoint.clip.visual_projection)
    )
    run(checkpoint, TrainingConfig(), n=2)
    assert not decoder and unet
    unet.clear()
    assert set(run(checkpoint, TrainingConfig(**(OFF | {"lambda_itc": 1.0})), n=2)[1]) == {"itc"}
    assert not decoder and not unet and tower
    tower.clear()
    assert set(run(checkpoint, TrainingConfig(**(OFF | {"lambda_is": 1.0})), n=2)[1]) == {"is"}
    assert not decoder and not tower and unet


def test_dropped_captions_become_the_empty_caption(checkpoint: Checkpoint) -> None:
    conditions: list[torch.Tensor] = []
    checkpoint.unet.register_forward_pre_hook(lambda _, inputs: conditions.append(inputs[2]))
    model, _ = run(checkpoint, TrainingConfig(**(OFF | {"lambda_is": 1.0}), caption_dropout=0.5))
    empty = model.text_encoder(tokenize(checkpoint.tokenizer, [""])).last_hidden_state[0]
    dropped = [torch.allclose(states, empty, atol=1e-5) for states in conditions[0]]
    assert 0 < sum(dropped) < len(dropped)


def test_bf16_is_close_to_fp32(checkpoint: Checkpoint) -> None:
    values = [
        {name: value.item() for name, (_, value) in run(checkpoint, TrainingConfig(precision=precision))[1].items()}
        for precision in ("fp32", "bf16")
    ]
    assert values[1] == pytest.approx(values[0], rel=0.05)


def test_latents_decode_to_what_was_encoded(checkpoint: Checkpoint) -> None:
    model = JointModel(checkpoint)
    pixels = torch.rand(2, 3, 32, 32)
    latents = model.encode(pixels)
    expected = checkpoint.vae.encode(pixels * 2 - 1).latent_dist.mean * checkpoint.vae.config.scaling_factor
    torch.testing.assert_close(latents, expected)
    reconstruction = checkpoint.vae.decode(checkpoint.vae.encode(pixels * 2 - 1).latent_dist.mean).sample
    torch.testing.assert_close(model.decode(latents), reconstruction / 2 + 0.5, atol=1e-4, rtol=1e-4)


def test_pixels_for_clip_equal_those_of_the_image_processor(checkpoint: Checkpoint) -> None:
    pixels = (torch.rand(1, 3, 32, 32) * 255).to(torch.uint8)
    expected = checkpoint.image_processor(pixels[0].permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
    torch.testing.assert_close(JointModel(checkpoint).to_clip(pixels.float() / 255), expected, atol=1e-5, rtol=1e-5)


def test_unknown_prediction_type_is_refused(checkpoint: Checkpoint) -> None:
    checkpoint.scheduler.register_to_config(prediction_type="sample")
    with pytest.raises(CheckpointError, match="'sample'"):
        JointModel(checkpoint)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": -1.0},
        {"lambda_itc": -0.1},
        {"ema_decay": 1.0},
        {"caption_dropout": 1.5},
        {"precision": "fp8"},
        {"lora_text": -1},
        {"learning_rate_unet": -1e-4},
        {"batch_size": 64, "contrastive_batch": 32},
        {"learning_rate": float("nan")},
        OFF,
    ],
    ids=str,
)
def test_invalid_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(OptionError):
        TrainingConfig(**wrong)
