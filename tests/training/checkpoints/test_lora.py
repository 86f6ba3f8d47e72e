"""LoRA files merged into a base: equal to diffusers, equal to the formula, and refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import StableDiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.lora_files import make_lora  # noqa: E402

from unidiff_sdk.errors import CheckpointError, OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions, Lora  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")


def weights(model: Any) -> dict[str, Any]:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def load(base: Path, *loras: str | Path) -> Checkpoint:
    return load_base(base, options=BaseOptions.of(lora=loras))


@pytest.mark.parametrize("form", ["kohya", "peft", "diffusers"])
@pytest.mark.filterwarnings("ignore:.*changes the text encoder")
def test_merged_weights_follow_the_formula(random_checkpoint: Path, tmp_path: Path, form: str) -> None:
    changes = make_lora(random_checkpoint, tmp_path / "a.safetensors", form=form)
    assert {part for part, _ in changes} == {"unet", "text_encoder"}
    before, after = load_checkpoint(random_checkpoint), load(random_checkpoint, f"{tmp_path / 'a.safetensors'}:-0.5")
    for part in ("unet", "text_encoder"):
        old, new = weights(getattr(before, part)), weights(getattr(after, part))
        assert old.keys() == new.keys()
        for name, tensor in new.items():
            change = changes.pop((part, name), changes.pop((part, f"text_model.{name}"), None))
            torch.testing.assert_close(tensor, old[name] if change is None else old[name] - 0.5 * change)
    assert not changes
    assert all(
        parameter.requires_grad for model in (after.unet, after.text_encoder) for parameter in model.parameters()
    )


@pytest.mark.filterwarnings("ignore:.*changes the text encoder")
def test_several_loras_equal_those_of_diffusers(random_checkpoint: Path, tmp_path: Path) -> None:
    files = {"kohya": 0.7, "peft": -0.4, "diffusers": 1.0}
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint)
    for seed, form in enumerate(files):
        file = tmp_path / f"{form}.safetensors"
        make_lora(random_checkpoint, file, form=form, text=form != "kohya", seed=seed)
        pipeline.load_lora_weights(file, adapter_name=form)
    pipeline.set_adapters(list(files), list(files.values()))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    loaded = load(random_checkpoint, *(f"{tmp_path / form}.safetensors:{weight}" for form, weight in files.items()))
    for part in ("unet", "text_encoder"):
        ours, theirs = weights(getattr(loaded, part)), weights(getattr(pipeline, part))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, atol=1e-5, rtol=0)
    assert [lora["weight"] for lora in loaded.meta["loras"]] == [0.7, -0.4, 1.0]


def test_search_keeps_its_tower_where_a_lora_changes_the_text_encoder(random_checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    make_lora(random_checkpoint, file)
    before = load_checkpoint(random_checkpoint)
    with pytest.warns(UserWarning, match=r"a\.safetensors changes the text encoder .* Search keeps the text tower"):
        loaded = load(random_checkpoint, file)
    assert before.shared and not loaded.shared and loaded.shared_layers == 0
    theirs = weights(before.clip)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(loaded.clip).items())


@pytest.mark.filterwarnings("error:.*changes the text encoder")
def test_lora_of_the_unet_alone_leaves_the_tower_shared(random_checkpoint: Path, tmp_path: Path) -> None:
    make_lora(random_checkpoint, tmp_path / "a.safetensors", text=False)
    assert load(random_checkpoint, tmp_path / "a.safetensors").shared


def rename(tensors: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def widen(tensors: dict[str, Any], part: str) -> dict[str, Any]:
    """As for a model whose layers are twice as wide."""
    wide = lambda key, t: torch.cat([t, t], dim=1) if key.startswith(part) and key.endswith("down.weight") else t  # noqa: E731
    return {key: wide(key, tensor) for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: rename(t, "lora_unet_mid", "lora_unet_end"), r"tensors do not fit: unet\.end.* \(no such layer\)"),
        (lambda t: rename(t, "lora_te_", "lora_te2_"), r"text_encoder_2\..* \(no such layer\).* and \d+ more"),
        (lambda t: widen(t, "lora_te_"), r"text_encoder\..* \(matrices of shape \[3, 64\] and"),
        (lambda t: widen(t, "lora_unet_"), r"unet\..* for a layer of shape \[\d+, \d+\]\)"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("q_proj.lora_up.weight")}, "does not know its format"),
        (lambda t: t | {"lora_unet_conv_in.hada_w1_a": torch.ones(2)}, "not been correctly renamed.*hada_w1_a"),
        (lambda t: t | {"unet.conv_in.lora_A.weight": torch.ones(2, 2)}, "keys are of several formats: unet.conv_in"),
        (lambda t: t | {"lora_unet_conv_in.dora_scale": torch.ones(2)}, "it is a DoRA.*: lora_unet_conv_in.dora_scale"),
        (lambda t: {k: v / 0 for k, v in t.items()}, "values that are not finite: lora_"),
        (lambda t: {"weight": torch.ones(2)}, r"tensors do not fit: weight \(no such layer\)"),
        (lambda t: {}, "it holds no tensor"),
    ],
)
def test_lora_that_does_not_fit_is_refused(random_checkpoint: Path, tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "a.safetensors"
    make_lora(random_checkpoint, file)
    save_file(change(load_file(file)), tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match=rf"The LoRA .*b\.safetensors does not fit the base: .*{message}"):
        load(random_checkpoint, tmp_path / "b.safetensors")


def test_files_that_are_no_lora_are_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="does not fit the base: it cannot be read"):
        load(random_checkpoint, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"There is no LoRA file .*none\.safetensors"):
        load(random_checkpoint, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.pt is a pickle, which can run code"):
        load(random_checkpoint, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is not a \.safetensors file"):
        load(random_checkpoint, __file__)


def test_weight_of_a_lora_is_part_of_its_name(tmp_path: Path) -> None:
    assert Lora.parse("a.safetensors") == Lora(Path("a.safetensors"), 1.0)
    assert Lora.parse("a:b.safetensors:-1.5") == Lora(Path("a:b.safetensors"), -1.5)
    assert Lora.parse("C:a.safetensors") == Lora(Path("C:a.safetensors"), 1.0)
    odd = tmp_path / "a:2"
    odd.touch()
    assert Lora.parse(odd) == Lora(odd, 1.0)
    for weight in ("nan", "inf", "11", "0"):
        with pytest.raises(OptionError, match=r"The weight of the LoRA a\.safetensors"):
            Lora.parse(f"a.safetensors:{weight}")
