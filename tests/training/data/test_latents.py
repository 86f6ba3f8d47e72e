"""Latents on disk: found by content, computed again if damaged, never those of another image or VAE."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from safetensors.torch import load_file, save_file  # noqa: E402

from unidiff_sdk.errors import DataError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.fitted_images import FittedImages  # noqa: E402
from unidiff_sdk.training.data.latents import LatentCache, encode_latents  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402


@pytest.fixture
def model(random_checkpoint: Path) -> JointModel:
    """With `encoded`: the number of images that its VAE has encoded."""
    model = JointModel(load_checkpoint(random_checkpoint))
    model.encoded = 0

    def count(encoder: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        model.encoded += len(inputs[0])

    model.vae.encoder.register_forward_pre_hook(count)
    return model


@pytest.fixture
def images(random_checkpoint: Path, small_catalog: Path) -> FittedImages:
    return load_pairs(small_catalog, load_checkpoint(random_checkpoint), limit=4).images


def test_each_image_is_encoded_once(model: JointModel, images: FittedImages, tmp_path: Path) -> None:
    first = encode_latents(model, images, LatentCache(tmp_path, model))
    second = encode_latents(model, images, LatentCache(tmp_path, model))
    assert model.encoded == 4 and torch.equal(first, second)
    assert torch.equal(first, encode_latents(model, images))
    alone = torch.cat([model.encode(images[torch.tensor([n])].float() / 255) for n in range(4)])
    assert torch.equal(first, alone), "independent of the other images"


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "changed", "other"])
def test_damaged_entries_are_computed_again(
    model: JointModel, images: FittedImages, tmp_path: Path, damage: str
) -> None:
    first = encode_latents(model, images, LatentCache(tmp_path, model))
    entry = sorted(tmp_path.rglob("*.safetensors"))[0]
    whole = entry.read_bytes()
    if damage == "other":
        save_file({"other": torch.zeros(3)}, entry)
    else:
        changed = whole[:-4] + bytes(b ^ 1 for b in whole[-4:])
        entry.write_bytes({"cut": whole[:-9], "empty": b"", "garbage": b"x" * 500, "changed": changed}[damage])
    assert torch.equal(encode_latents(model, images, LatentCache(tmp_path, model)), first)
    assert model.encoded == 5 and load_file(entry).keys() == {"latents"}
    assert entry.read_bytes() == whole


def test_another_vae_has_other_entries(model: JointModel, images: FittedImages, tmp_path: Path) -> None:
    first = encode_latents(model, images, LatentCache(tmp_path, model))
    with torch.no_grad():
        model.vae.quant_conv.bias += 1.0
    assert not torch.equal(encode_latents(model, images, LatentCache(tmp_path, model)), first)
    assert model.encoded == 8


def test_folder_that_cannot_be_written_is_an_error(model: JointModel, images: FittedImages, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"Cannot write latents to .*file"):
        encode_latents(model, images, LatentCache(tmp_path / "file", model))
