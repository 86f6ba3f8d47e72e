"""A VAE that takes the place of the base's: a folder or a file, by the loaders of diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import AutoencoderKL  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.lora_files import make_lora  # noqa: E402

from unidiff_sdk.errors import CheckpointError  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def other(random_checkpoint: Path, tmp_path: Path) -> AutoencoderKL:
    """A VAE with other weights and another scaling factor than the base's, saved as `vae`."""
    torch.manual_seed(7)
    config = AutoencoderKL.load_config(random_checkpoint / "vae")
    vae = AutoencoderKL.from_config(config, scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    return vae


def load(base: Path, vae: Path) -> Any:
    return load_base(base, options=BaseOptions.of(vae=vae)).vae


def equal(model: Any, other: Any) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_folder_replaces_the_vae_with_its_scaling_factor(
    random_checkpoint: Path, tmp_path: Path, other: AutoencoderKL
) -> None:
    loaded = load(random_checkpoint, tmp_path / "vae")
    assert equal(loaded, other) and loaded.config.scaling_factor == 0.5


def test_file_has_the_configuration_of_the_base(random_checkpoint: Path, tmp_path: Path, other: AutoencoderKL) -> None:
    loaded = load(random_checkpoint, tmp_path / "vae" / WEIGHTS)
    assert equal(loaded, other) and not loaded.training
    assert loaded.config.scaling_factor == load_checkpoint(random_checkpoint).vae.config.scaling_factor


@pytest.mark.filterwarnings("ignore:.*changes the text encoder")
def test_training_starts_from_the_additions_and_records_them(
    random_checkpoint: Path, small_catalog: Path, tmp_path: Path, other: AutoencoderKL
) -> None:
    changes = make_lora(random_checkpoint, tmp_path / "a.safetensors")
    config = TrainingConfig(steps=1, batch_size=4, warmup_steps=0, learning_rate=1e-6)
    lora = f"{tmp_path / 'a.safetensors'}:0.5"
    out = train(small_catalog, random_checkpoint, tmp_path / "out", config, lora=[lora], vae=tmp_path / "vae").path
    tuned, base = load_checkpoint(out), load_checkpoint(random_checkpoint)
    assert equal(tuned.vae, other) and not tuned.shared
    weights = tuned.unet.state_dict()
    for (part, name), change in changes.items():
        if part == "unet":
            expected = base.unet.state_dict()[name] + 0.5 * change
            torch.testing.assert_close(weights[name], expected, atol=1e-4, rtol=0)
    assert tuned.meta["loras"] == [{"name": "a.safetensors", "weight": 0.5}] and tuned.meta["vae"] == "vae"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "Merged LoRA files: `a.safetensors` (weight 0.5)." in card and "VAE: `vae`." in card


def test_vae_that_does_not_fit_is_refused(random_checkpoint: Path, tmp_path: Path, other: AutoencoderKL) -> None:
    folder, file = tmp_path / "vae", tmp_path / "vae" / WEIGHTS
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for changes, message in (
        ({"latent_channels": 16}, "has 16 latent channels, but that of the base has 4"),
        ({"block_out_channels": [16] * 4}, "has 4 blocks, but that of the base has 2"),
        ({"_class_name": "AutoencoderTiny"}, "is 'AutoencoderTiny', but the VAE must be an AutoencoderKL"),
        ({"latents_mean": [0.0] * 4}, "the VAE states latents_mean"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            load(random_checkpoint, folder)
    tensors = load_file(file)
    tensors.popitem()
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"short\.safetensors lacks tensors of the VAE that .*vae describes"):
        load(random_checkpoint, tmp_path / "short.safetensors")
    save_file({name: torch.cat([t, t]) for name, t in tensors.items()}, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="is not a VAE like the base's"):
        load(random_checkpoint, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="is not a VAE like the base's"):
        load(random_checkpoint, random_checkpoint / "clip" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vae\.pt is a pickle"):
        BaseOptions.of(vae=tmp_path / "vae.pt")
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="There is no VAE file"):
        BaseOptions.of(vae=folder)
