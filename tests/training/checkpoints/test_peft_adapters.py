"""Adapter folders of peft merged into a base: equal to peft's own merge, and refused where they are no plain LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from unidiff_sdk.errors import CheckpointError  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions  # noqa: E402

TARGETS = {"unet": ["to_q", "to_out.0", "conv1"], "text_encoder": ["q_proj", "fc1"]}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*changes the text encoder"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]


def make_adapter(checkpoint: Path, folder: Path, part: str, **settings: Any) -> Path:
    """Write an adapter with random matrices for one model, by peft."""
    torch.manual_seed(0)
    model = get_peft_model(
        getattr(load_checkpoint(checkpoint), part),
        LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": TARGETS[part], **settings}),
    )
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return folder


def merged(checkpoint: Path, folder: Path, part: str) -> dict[str, Any]:
    """The weights of a model with its adapter, by peft."""
    model: Any = PeftModel.from_pretrained(getattr(load_checkpoint(checkpoint), part), folder)
    return dict(model.merge_and_unload().state_dict())


def load(base: Path, folder: str | Path) -> Checkpoint:
    return load_base(base, options=BaseOptions.of(lora=[folder]))


def assert_equal(model: Any, expected: dict[str, Any]) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 9}, "rank_pattern": {"to_out.0": 2}}],
    ids=["plain", "rsLoRA", "patterns"],
)
def test_adapter_of_the_unet_equals_the_merge_of_peft(
    random_checkpoint: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    folder = make_adapter(random_checkpoint, tmp_path / "shoes", "unet", **settings)
    loaded = load(random_checkpoint, folder)
    assert_equal(loaded.unet, merged(random_checkpoint, folder, "unet"))
    changed = load_checkpoint(random_checkpoint).unet.state_dict()
    assert any(not torch.equal(tensor, changed[name]) for name, tensor in loaded.unet.state_dict().items())
    assert loaded.shared and loaded.meta["loras"] == [{"name": "shoes", "weight": 1.0}]


def test_folder_with_adapters_of_both_models(random_checkpoint: Path, tmp_path: Path) -> None:
    for part in ("unet", "text_encoder"):
        make_adapter(random_checkpoint, tmp_path / part, part)
    loaded = load(random_checkpoint, tmp_path)
    for part in ("unet", "text_encoder"):
        assert_equal(getattr(loaded, part), merged(random_checkpoint, tmp_path / part, part))
    assert not loaded.shared  # search keeps its tower
    (tmp_path / "text_encoder").rename(tmp_path / "text_encoder_2")  # of Stable Diffusion XL
    with pytest.raises(CheckpointError, match=r"text_encoder_2\..* \(no such layer\)"):
        load(random_checkpoint, tmp_path)


def test_weight_scales_the_change(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = make_adapter(random_checkpoint, tmp_path / "shoes", "unet")
    base, whole = load_checkpoint(random_checkpoint).unet.state_dict(), merged(random_checkpoint, folder, "unet")
    expected = {name: tensor + 0.5 * (whole[name] - tensor) for name, tensor in base.items()}
    assert_equal(load(random_checkpoint, f"{folder}:0.5").unet, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "is 'LOHA', which is not supported"),
        ({"use_dora": True}, "states use_dora True, which is not supported"),
        ({"bias": "all"}, "states bias 'all'"),
        ({"modules_to_save": ["conv_out"]}, "states modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "which also changes the weights of the base"),
        ({"lora_alpha": "many"}, "states lora_alpha 'many'; it must be a number"),
    ],
)
def test_adapter_that_is_no_plain_lora_is_refused(
    random_checkpoint: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    folder = make_adapter(random_checkpoint, tmp_path / "shoes", "unet")
    stated = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(stated | config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load(random_checkpoint, folder)


def test_tensors_and_files_that_do_not_fit_are_refused(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = make_adapter(random_checkpoint, tmp_path / "shoes", "unet")
    tensors = load_file(folder / WEIGHTS)
    other = {key.replace("down_blocks.1", "down_blocks.7"): tensor for key, tensor in tensors.items()}
    save_file(other, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"tensors do not fit: unet\.down_blocks\.7.* \(no such layer\)"):
        load(random_checkpoint, folder)
    save_file(tensors | {"base_model.model.conv_in.bias": torch.ones(16)}, folder / WEIGHTS)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias, which is no matrix of a LoRA"):
        load(random_checkpoint, folder)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors\. Only safetensors are read"):
        load(random_checkpoint, folder)
    with pytest.raises(CheckpointError, match=r"is a folder without adapter_config\.json"):
        load(random_checkpoint, tmp_path)
