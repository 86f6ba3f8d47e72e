"""Trainable weights: locked components, all weights or adapters, and checkpoints with merged adapters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import StableDiffusionPipeline  # noqa: E402
from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from unidiff_sdk.errors import OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import merged_state_dict, save_checkpoint  # noqa: E402
from unidiff_sdk.training.config import Component, TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.learner import Learner  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402
from unidiff_sdk.training.objective.tuning import ADAPTERS, KOHYA, add_adapters, component_of, set_trainable  # noqa: E402
from unidiff_sdk.training.runtime.processes import Processes  # noqa: E402

FEW = {"steps": 2, "batch_size": 6, "warmup_steps": 0, "learning_rate": 1e-2}
ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def checkpoint(random_checkpoint: Path) -> Checkpoint:
    return load_checkpoint(random_checkpoint)


def tuned_components(base: Path, path: Path) -> set[str]:
    """The components that differ from the base's. "temperature" counts separately."""
    before, after = (JointModel(load_checkpoint(folder)).state_dict() for folder in (base, path))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name]) and not name.startswith("f.")]
    return {"temperature" if name == "clip.logit_scale" else str(component_of(name)) for name in changed}


@pytest.mark.parametrize(
    ("settings", "tuned"),
    [
        ({}, {"unet", "text", "image", "temperature"}),
        ({"lock_unet": True}, {"text", "image", "temperature"}),
        ({"lock_text": True}, {"unet", "image", "temperature"}),
        ({"lock_image": True}, {"unet", "text", "temperature"}),
        ({"lock_image": True, "lock_text": True}, {"unet"}),
        ({"lora_unet": 2, "lora_text": 3, "lora_image": 1}, {"unet", "text", "image", "temperature"}),
        ({"lora_text": 2, "lock_image": True, "lock_unet": True}, {"text", "temperature"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_locked_components_stay_and_the_others_are_tuned(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, settings: dict, tuned: set[str]
) -> None:
    config = TrainingConfig(**(FEW | settings))
    train(small_catalog, random_checkpoint, tmp_path / "tuned", config, device="cpu")
    assert tuned_components(random_checkpoint, tmp_path / "tuned") == tuned


def test_locking_everything_is_refused(checkpoint: Checkpoint) -> None:
    config = TrainingConfig(lock_unet=True, lock_text=True, lock_image=True)
    with pytest.raises(OptionError, match="nothing to train"):
        set_trainable(JointModel(checkpoint), config)


def test_new_adapters_have_their_ranks_and_change_nothing(checkpoint: Checkpoint) -> None:
    plain = {name: t.clone() for name, t in checkpoint.clip.state_dict().items()}
    config = TrainingConfig(lora_unet=2, lora_text=3, lora_image=1)
    add_adapters(checkpoint, config)
    model = JointModel(checkpoint)
    set_trainable(model, config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ranks = {
        part: {p.shape[0] for n, p in trainable.items() if ".lora_A." in n and component_of(n) is part}
        for part in Component
    }
    assert ranks == {Component.UNET: {2}, Component.TEXT: {3}, Component.IMAGE: {1}}
    assert all(".lora_" in name or name == "clip.logit_scale" for name in trainable)
    merged = merged_state_dict(checkpoint.clip)
    assert merged.keys() == plain.keys() and all(torch.equal(merged[name], plain[name]) for name in plain)


def test_merged_weights_give_the_output_of_the_adapted_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Compared with the forward pass of peft."""
    add_adapters(checkpoint, TrainingConfig(lora_unet=2, lora_text=3, lora_image=1))
    with torch.no_grad():
        for name, parameter in JointModel(checkpoint).named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    merged = load_checkpoint(save_checkpoint(tmp_path / "merged", **checkpoint.parts(), meta={}))
    ids, pixels = torch.arange(1, 17)[None], torch.rand(1, 3, 32, 32)
    ids[0, -1] = checkpoint.tokenizer.eos_token_id
    latents, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        outputs = []
        for model in (checkpoint, merged):
            model.clip.eval(), model.unet.eval()
            states = model.text_encoder(ids).last_hidden_state
            clip = model.clip(input_ids=ids, pixel_values=pixels)
            outputs.append((states, clip.text_embeds, clip.image_embeds, model.unet(latents, t, states).sample))
    for adapted, plain in zip(*outputs, strict=True):
        torch.testing.assert_close(plain, adapted, atol=1e-5, rtol=1e-5)


def test_saved_adapters_load_in_peft(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**FEW, lora_unet=2, lora_text=3, lora_image=1)
    out = train(small_catalog, random_checkpoint, tmp_path / "tuned", config, device="cpu").path
    base, tuned = load_checkpoint(random_checkpoint), load_checkpoint(out)
    for name in ("unet", "clip"):
        adapted = PeftModel.from_pretrained(getattr(base, name), out / ADAPTERS / name).merge_and_unload().state_dict()
        ours = getattr(tuned, name).state_dict()
        assert adapted.keys() == ours.keys()
        for key in ours.keys() - {"logit_scale"}:  # the temperature has no adapter; it is tuned directly
            torch.testing.assert_close(adapted[key], ours[key], atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("ranks", [{"lora_unet": 2, "lora_text": 3}, {"lora_text": 2, "lock_unet": True}], ids=str)
def test_saved_adapters_load_in_diffusers_and_kohya_format(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, ranks: dict
) -> None:
    """In the base's pipeline, they give the output of the merged weights."""
    out = train(small_catalog, random_checkpoint, tmp_path / "tuned", TrainingConfig(**FEW, **ranks), device="cpu").path
    base, tuned = (StableDiffusionPipeline.from_pretrained(path) for path in (random_checkpoint, out))
    ids = tuned.tokenizer(["a red dress"], padding="max_length", return_tensors="pt").input_ids
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))

    def output(pipeline: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            states = pipeline.text_encoder(ids).last_hidden_state
            return states, pipeline.unet(latents, 500, states).sample

    before = output(base)
    for file in (None, KOHYA):
        base.load_lora_weights(out / ADAPTERS, weight_name=file)
        for old, adapted, merged in zip(before, output(base), output(tuned), strict=True):
            torch.testing.assert_close(adapted, merged, atol=1e-5, rtol=1e-4)
            assert (old - merged).abs().max() > 1e-3
        base.unload_lora_weights()
    names = load_file(out / ADAPTERS / KOHYA)
    assert all(re.fullmatch(r"lora_(unet|te)_\w+\.(lora_down\.weight|lora_up\.weight|alpha)", name) for name in names)


def test_adapters_resume_bit_for_bit(small_catalog: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    config = TrainingConfig(**(FEW | {"steps": 3}), lora_unet=2, lora_text=3, lora_image=1)

    def interrupt(report) -> None:
        if report.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(small_catalog, random_checkpoint, tmp_path / "a", config, device="cpu", on_step=interrupt)
    for name in ("a", "b"):
        train(small_catalog, random_checkpoint, tmp_path / name, config, device="cpu", resume=True)
    a, b = (JointModel(load_checkpoint(tmp_path / name)).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_each_component_has_its_learning_rate(checkpoint: Checkpoint) -> None:
    config = TrainingConfig(learning_rate=1e-3, learning_rate_unet=1e-4, learning_rate_image=1e-5)
    model = JointModel(checkpoint)
    set_trainable(model, config)
    learner = Learner(model, config, ALONE)
    peaks = {id(p): group["peak"] for group in learner.optimizer.param_groups for p in group["params"]}
    expected = {Component.UNET: 1e-4, Component.TEXT: 1e-3, Component.IMAGE: 1e-5}
    assert all(peaks[id(p)] == expected[component_of(name)] for name, p in learner.trainable.items())
    assert len(peaks) == len(learner.trainable)
