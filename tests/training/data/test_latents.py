"""Latents on disk: found again by content, made anew when damaged, never those of another picture or VAE."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from safetensors.torch import load_file, save_file  # noqa: E402

from unidiff_sdk.errors import DataError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.batches import load_pairs  # noqa: E402
from unidiff_sdk.training.data.images import Pictures  # noqa: E402
from unidiff_sdk.training.data.latents import LatentCache, encode_latents  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402


@pytest.fixture
def model(random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> JointModel:
    """With `calls`: how many pictures its VAE has encoded."""
    model = JointModel(load_checkpoint(random_checkpoint))
    plain = model.encode
    model.calls = 0

    def counting(pixels: torch.Tensor) -> torch.Tensor:
        model.calls += len(pixels)
        return plain(pixels)

    monkeypatch.setattr(model, "encode", counting)
    return model


@pytest.fixture
def images(random_checkpoint: Path, small_catalog: Path) -> Pictures:
    return load_pairs(small_catalog, load_checkpoint(random_checkpoint), limit=4).images


def test_each_picture_is_encoded_once(model: JointModel, images: Pictures, tmp_path: Path) -> None:
    first = encode_latents(model, images, LatentCache(tmp_path, model))
    second = encode_latents(model, images, LatentCache(tmp_path, model))
    assert model.calls == 4 and torch.equal(first, second)
    assert torch.equal(first, encode_latents(model, images))
    alone = torch.cat([model.encode(images[torch.tensor([n])].float() / 255) for n in range(4)])
    assert torch.equal(first, alone), "whichever others are encoded with it"


@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "changed", "other"])
def test_damaged_entries_are_made_anew(model: JointModel, images: Pictures, tmp_path: Path, damage: str) -> None:
    first = encode_latents(model, images, LatentCache(tmp_path, model))
    entry = sorted(tmp_path.rglob("*.safetensors"))[0]
    whole = entry.read_bytes()
    if damage == "other":
        save_file({"other": torch.zeros(3)}, entry)
    else:
        changed = whole[:-4] + bytes(b ^ 1 for b in whole[-4:])
        entry.write_bytes({"cut": whole[:-9], "empty": b"", "garbage": b"x" * 500, "changed": changed}[damage])
    assert torch.equal(encode_latents(model, images, LatentCache(tmp_path, model)), first)
    assert model.calls == 5 and load_file(entry).keys() == {"latents"}
    assert entry.read_bytes() == whole


def test_another_vae_has_entries_of_its_own(model: JointModel, images: Pictures, tmp_path: Path) -> None:
    first = encode_latents(model, images, LatentCache(tmp_path, model))
    with torch.no_grad():
        model.vae.quant_conv.bias += 1.0
    assert not torch.equal(encode_latents(model, images, LatentCache(tmp_path, model)), first)
    assert model.calls == 8


def test_a_place_that_cannot_be_written_is_told(model: JointModel, images: Pictures, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"cannot keep latents in .*file"):
        encode_latents(model, images, LatentCache(tmp_path / "file", model))
