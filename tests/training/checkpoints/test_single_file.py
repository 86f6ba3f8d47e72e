"""Stable Diffusion in one file, in the original layout: equal to the pipeline that the file was made from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from diffusers.loaders.single_file_utils import (  # noqa: E402
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from safetensors.torch import load_file, save_file  # noqa: E402
from support.ldm_files import make_single_file, unet_name, vae_name  # noqa: E402
from support.random_sdxl import make_random_sdxl  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

from unidiff_sdk.errors import CheckpointError, OptionError  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.single_file import SD15  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402


@pytest.fixture(scope="module")
def file(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_single_file(random_checkpoint, tmp_path_factory.mktemp("single") / "shop.safetensors")


def load(file: Path, base: Path, **options: Any) -> Checkpoint:
    return load_base(file, base / "clip", BaseOptions.of(**{"base_config": base, **options}))


def weights(model: Any) -> dict[str, Any]:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def assert_same(ours: Checkpoint, theirs: Checkpoint, *, half: bool = False) -> None:
    for part in ("unet", "vae", "text_encoder"):
        found, expected = weights(getattr(ours, part)), weights(getattr(theirs, part))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            # A text encoder in half precision is recognized as the tower of CLIP, whose values are used.
            wanted = tensor.half().float() if half and part != "text_encoder" else tensor
            assert found[name].dtype == torch.float32 and torch.equal(found[name], wanted), (part, name)


@pytest.mark.parametrize("text", ["clip", "open_clip"])
def test_file_equals_the_pipeline_that_it_was_made_from(random_checkpoint: Path, tmp_path: Path, text: str) -> None:
    made = make_single_file(random_checkpoint, tmp_path / "shop.safetensors", text=text)
    loaded = load(made, random_checkpoint)
    assert_same(loaded, load_checkpoint(random_checkpoint))
    assert loaded.shared and loaded.name == "shop" and loaded.path == made
    assert not any(model.training for model in (loaded.unet, loaded.vae, loaded.text_encoder))
    assert loaded.image_size == 32 and loaded.sampler_defaults["name"] == "ddim"


def test_file_of_sdxl_equals_the_pipeline_that_it_was_made_from(tmp_path: Path) -> None:
    base = make_random_sdxl(tmp_path / "xl")
    made = make_single_file(base, tmp_path / "xl.safetensors", text="xl")
    loaded, theirs = load(made, base), load_checkpoint(base)
    assert_same(loaded, theirs)
    assert loaded.second and theirs.second and loaded.shared == theirs.shared
    found, expected = loaded.second.model.state_dict(), theirs.second.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

    tensors = load_file(made)
    save_file({name: t for name, t in tensors.items() if "embedders.1" not in name}, tmp_path / "first.safetensors")
    with pytest.raises(CheckpointError, match="has no second text encoder in the original layout"):
        load(tmp_path / "first.safetensors", base)
    save_file(lacking(tensors, "conditioner.embedders.1.model.ln_final.bias"), tmp_path / "short.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks .* tensors of the second text encoder that"):
        load(tmp_path / "short.safetensors", base)
    with pytest.raises(CheckpointError, match=r"is an SDXL checkpoint; name a folder .* with --base-config"):
        load_base(made, base / "clip", BaseOptions.of(base_config=without_second(base, tmp_path / "other")))


def without_second(base: Path, folder: Path) -> Path:
    """A pipeline folder with one text encoder."""
    shutil.copytree(base, folder)
    shutil.rmtree(folder / "text_encoder_2")
    unet = json.loads((folder / "unet" / "config.json").read_text())
    plain = {"addition_embed_type": None, "cross_attention_dim": 32}
    (folder / "unet" / "config.json").write_text(json.dumps(unet | plain))
    return folder


def test_half_precision_is_read_as_float32_and_shared(random_checkpoint: Path, tmp_path: Path) -> None:
    made = make_single_file(random_checkpoint, tmp_path / "half.safetensors", half=True)
    loaded = load(made, random_checkpoint)
    assert_same(loaded, load_checkpoint(random_checkpoint), half=True)
    assert loaded.shared


def test_training_starts_from_a_file(random_checkpoint: Path, file: Path, small_catalog: Path, tmp_path: Path) -> None:
    config = TrainingConfig(steps=1, batch_size=4, warmup_steps=0, learning_rate=1e-12)
    clip, base = random_checkpoint / "clip", random_checkpoint
    trained = load_checkpoint(train(small_catalog, file, tmp_path / "out", config, clip=clip, base_config=base).path)
    before = weights(load_checkpoint(base).unet)
    assert all(torch.allclose(tensor, before[name], atol=1e-9) for name, tensor in weights(trained.unet).items())
    assert trained.meta["base"] == "shop"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"conditioner.embedders.0.a": torch.ones(1)}, "is an SDXL checkpoint"),
        (lambda t: {"lora_unet_a.lora_down.weight": torch.ones(1)}, "is a LoRA; merge it into a base with --lora"),
        (lambda t: {"control_model.a": torch.ones(1)}, "is a ControlNet"),
        (
            lambda t: {k: v for k, v in t.items() if not k.startswith("first")},
            r"has no VAE in .* Name a VAE with --vae",
        ),
        (lambda t: {k: v for k, v in t.items() if "cond_stage" not in k}, "has no text encoder in the original layout"),
        (lambda t: {"weight": torch.ones(1)}, "has no UNet and no text encoder and no VAE in the original layout"),
        (lambda t: t | {"v_pred": torch.ones(0)}, r"marked as a model of v-prediction \(v_pred\), but .* 'epsilon'"),
        (lambda t: t | {"alphas_cumprod": torch.linspace(1, 0, 1000)}, "The noise schedule in .* is not that of"),
        (lambda t: lacking(t, "model.diffusion_model.out.2.bias"), "lacks tensors of the UNet that"),
        (lambda t: lacking(t, "first_stage_model.quant_conv.bias"), "lacks tensors of the VAE that"),
        (lambda t: lacking(t, "cond_stage_model.transformer.text_model.final_layer_norm.bias"), "of the text encoder"),
        (lambda t: wider(t, "model.diffusion_model.out.2.weight"), "The UNet of .* does not fit the configuration"),
        (lambda t: wider(t, "input_blocks.0.0.weight"), "has 8 input channels, but .* describes one with 4"),
        (lambda t: wider(t, "attn2.to_k.weight"), "has 64 token states, but .* describes one with 32"),
    ],
)
def test_file_that_does_not_fit_is_refused(
    random_checkpoint: Path, file: Path, tmp_path: Path, change: Any, message: str
) -> None:
    save_file(change(load_file(file)), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "other.safetensors", random_checkpoint)


def lacking(tensors: dict[str, Any], name: str) -> dict[str, Any]:
    assert name in tensors
    return {key: tensor for key, tensor in tensors.items() if key != name}


def wider(tensors: dict[str, Any], end: str) -> dict[str, Any]:
    return {key: torch.cat([t, t], dim=1) if key.endswith(end) else t for key, t in tensors.items()}


def test_schedule_in_the_file_is_that_of_the_configuration(random_checkpoint: Path, file: Path, tmp_path: Path) -> None:
    schedule = DDIMScheduler.from_pretrained(random_checkpoint / "scheduler").alphas_cumprod
    save_file(load_file(file) | {"alphas_cumprod": schedule.half()}, tmp_path / "a.safetensors")
    assert load(tmp_path / "a.safetensors", random_checkpoint).shared


def test_averaged_weights_are_not_read(random_checkpoint: Path, file: Path, tmp_path: Path) -> None:
    tensors = load_file(file)
    save_file(tensors | {"model_ema.decay": torch.ones(1)}, tmp_path / "ema.safetensors")
    with pytest.warns(UserWarning, match="holds averaged weights"):
        loaded = load(tmp_path / "ema.safetensors", random_checkpoint)
    assert_same(loaded, load_checkpoint(random_checkpoint))


def test_another_vae_takes_the_place_of_a_missing_one(random_checkpoint: Path, file: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("first_stage_model.")}
    save_file(tensors, tmp_path / "pruned.safetensors")
    loaded = load(tmp_path / "pruned.safetensors", random_checkpoint, vae=random_checkpoint / "vae")
    assert_same(loaded, load_checkpoint(random_checkpoint))


def test_options_that_do_not_belong_to_the_base_are_refused(
    random_checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.ckpt").touch()
    with pytest.raises(CheckpointError, match=r"The checkpoint .*a\.ckpt is a pickle, which can run code"):
        load(tmp_path / "a.ckpt", random_checkpoint)
    with pytest.raises(CheckpointError, match=r"There is no checkpoint file .*b\.safetensors"):
        load(tmp_path / "b.safetensors", random_checkpoint)
    with pytest.raises(OptionError, match="is a single file, so it has no variant 'fp16'"):
        load(file, random_checkpoint, variant="fp16")
    with pytest.raises(OptionError, match="is not a single file"):
        load(random_checkpoint, random_checkpoint)
    with pytest.raises(CheckpointError, match=r"There is no folder .*none with the configuration"):
        load(file, random_checkpoint, base_config=tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"shop\.safetensors has no CLIP model\. Name one with --clip"):
        load_base(file, options=BaseOptions.of(base_config=random_checkpoint))


def test_built_in_configuration_is_that_of_stable_diffusion_1_5() -> None:
    """By the published numbers of parameters of the three models."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15 / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SD15 / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15 / "text_encoder"))
    assert unet.num_parameters() == 859_520_964
    assert vae.num_parameters() == 83_653_863
    assert text_encoder.num_parameters() == 123_060_480
    assert unet.config.sample_size == 64 and vae.config.scaling_factor == 0.18215

    # diffusers converts every tensor of a file with this layout, and to the shapes of these models.
    for model, prefix, convert, named in (
        (unet, "model.diffusion_model.", convert_ldm_unet_checkpoint, lambda name: unet_name(name, 2, {1, 2, 3})),
        (vae, "first_stage_model.", convert_ldm_vae_checkpoint, lambda name: vae_name(name, 4)),
    ):
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        file = {f"{prefix}{named(name)}": torch.empty(shape, device="meta") for name, shape in expected.items()}
        assert len(file) == len(expected)
        assert {name: tensor.shape for name, tensor in convert(file, model.config).items()} == expected


def test_built_in_configuration_takes_the_tokenizer_of_clip(
    random_checkpoint: Path, file: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"model_max_length is 16, but the text encoder has 77 positions"):
        load_base(file, random_checkpoint / "clip")
    clip = tmp_path / "clip"
    clip.mkdir()
    for source in (random_checkpoint / "clip").iterdir():
        (clip / source.name).write_bytes(source.read_bytes())
    settings = json.loads((clip / "tokenizer_config.json").read_text())
    (clip / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    with pytest.raises(CheckpointError, match=r"has 32 token states, but .*sd15 describes one with 768"):
        load_base(file, clip)
