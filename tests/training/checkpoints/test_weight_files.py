"""Weight files of a base: variants, and shards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import StableDiffusionPipeline  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from unidiff_sdk.errors import CheckpointError, OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions  # noqa: E402


@pytest.fixture
def clip(random_checkpoint: Path) -> Path:
    return random_checkpoint / "clip"


@pytest.fixture
def half(random_checkpoint: Path, tmp_path: Path) -> Path:
    """A pipeline whose weights exist only as the variant fp16, as diffusers saves it."""
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "half", variant="fp16")
    return tmp_path / "half"


def unet_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: tensor.float() for name, tensor in checkpoint.unet.state_dict().items()}


def test_only_variant_is_loaded_and_reported(half: Path, clip: Path) -> None:
    assert not list(half.glob("*/*model.safetensors"))
    with pytest.warns(UserWarning, match="half has no main weight files. Its only variant fp16 is loaded"):
        loaded = load_base(half, clip)
    assert loaded.options.variant == "fp16" and loaded.unet.dtype == torch.float32
    theirs = StableDiffusionPipeline.from_pretrained(half, variant="fp16", torch_dtype=torch.float32)
    for name, tensor in theirs.unet.state_dict().items():
        assert torch.equal(unet_of(loaded)[name], tensor)


def test_half_precision_text_encoder_is_shared_with_the_same_clip(half: Path, clip: Path) -> None:
    with pytest.warns(UserWarning, match="variant fp16"):
        loaded = load_base(half, clip)
    assert loaded.shared and loaded.shared_layers == 2
    full = CLIPModel.from_pretrained(clip).text_model.state_dict()
    for name, tensor in loaded.clip.text_model.state_dict().items():
        assert torch.equal(tensor, full[name])


@pytest.mark.filterwarnings("error:.*variant")
def test_requested_variant_is_loaded_next_to_main_files(half: Path, random_checkpoint: Path, clip: Path) -> None:
    shutil.copytree(random_checkpoint, half, dirs_exist_ok=True, ignore=shutil.ignore_patterns("clip", "unidiff.json"))
    (half / "vae" / "diffusion_pytorch_model.fp16.safetensors").unlink()  # from its main file then, as in diffusers
    main, variant = load_base(half, clip), load_base(half, clip, BaseOptions.of(variant="fp16"))
    assert (main.options.variant, variant.options.variant) == (None, "fp16")
    for name, tensor in unet_of(main).items():
        assert torch.equal(unet_of(variant)[name], tensor.half().float())
    assert any(not torch.equal(unet_of(variant)[name], tensor) for name, tensor in unet_of(main).items())
    for name, tensor in main.vae.state_dict().items():
        assert torch.equal(variant.vae.state_dict()[name], tensor)


def test_variant_that_cannot_be_chosen_is_refused(half: Path, random_checkpoint: Path, clip: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'bf16'. Variants: fp16"):
        load_base(half, clip, BaseOptions.of(variant="bf16"))
    with pytest.raises(CheckpointError, match=r"no weights of the variant 'fp16'. Variants: none"):
        load_checkpoint(random_checkpoint, BaseOptions.of(variant="fp16"))
    vae = half / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.ema.safetensors"))
    with pytest.raises(
        CheckpointError, match="its weights in variants that its parts do not have in common: ema, fp16"
    ):
        load_base(half, clip)
    with pytest.raises(CheckpointError, match=r"vae has weights neither of the variant 'fp16' nor as .* only of ema"):
        load_base(half, clip, BaseOptions.of(variant="fp16"))
    for part in ("unet", "text_encoder", "vae"):
        for file in (half / part).glob("*.safetensors"):
            for name in ("fp16", "ema"):
                target = file.with_name(f"{file.name.split('.')[0]}.{name}.safetensors")
                if not target.exists():
                    shutil.copy(file, target)
    with pytest.raises(CheckpointError, match=r"only as variants: ema, fp16\. Name the one to load with --variant"):
        load_base(half, clip)
    with pytest.raises(OptionError, match=r"variant is '\.\./fp16'; it must be"):
        BaseOptions.of(variant="../fp16")


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.filterwarnings("ignore:.*only variant")
def test_shards_equal_the_single_file(random_checkpoint: Path, clip: Path, tmp_path: Path, variant: str | None) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint)
    pipeline.save_pretrained(tmp_path / "shards", variant=variant, max_shard_size="50KB")
    index = "diffusion_pytorch_model.safetensors.index" + (f".{variant}.json" if variant else ".json")
    assert (tmp_path / "shards" / "unet" / index).is_file()
    assert len(list((tmp_path / "shards" / "text_encoder").glob("*-of-*"))) > 1
    loaded, expected = load_base(tmp_path / "shards", clip), load_checkpoint(random_checkpoint)
    assert loaded.shared
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(expected, part).state_dict()
        for name, tensor in getattr(loaded, part).state_dict().items():
            assert torch.equal(tensor, theirs[name])


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../x.safetensors", r"names the shard '\.\./x\.safetensors'; only safetensors next to it"),
        ("x.bin", "names the shard 'x.bin'; only safetensors"),
        ("x.safetensors", "unet lacks the shard x.safetensors. Download it"),
        (None, "has no weight_map"),
    ],
)
def test_shards_elsewhere_are_refused(
    random_checkpoint: Path, clip: Path, tmp_path: Path, shard: str | None, message: str
) -> None:
    shutil.copytree(random_checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("clip", "unidiff.json"))
    unet = tmp_path / "base" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(tmp_path / "base" / "x.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": shard} if shard else {}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_base(tmp_path / "base", clip)
