"""LoRA files on Stable Diffusion 3.5, merged and switchable: equal to the formula and to diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from support.lora_files import make_lora
from support.pipeline_folders import change_json
from support.random_sd3 import make_random_sd3

from unidiff_export import export_bundle
from unidiff_export.pipeline import generate_images
from unidiff_export.verification import psnr_db
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions

pytestmark = pytest.mark.filterwarnings("ignore:.*changes the text encoder")

PROMPTS = ["a red striped dress", "green dotted boots"]
SETTINGS: dict[str, Any] = {"steps": 3, "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_random_sd3(tmp_path_factory.mktemp("checkpoint") / "sd3")
    change_json("unidiff.json", captions=PROMPTS)(folder)
    return folder


def images_of_diffusers(folder: Path, **loras: float) -> Any:
    """Images with the named LoRA files of `folder`'s parent, by `set_adapters`."""
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    for name in loras:
        pipeline.load_lora_weights(folder.parent / f"{name}.safetensors", adapter_name=name)
    if loras:
        pipeline.set_adapters(list(loras), list(loras.values()))
    return generate_images(pipeline, PROMPTS, side=16, seed=1, negative_prompt="", **SETTINGS)


def generated(bundle: Bundle, noise: Any, **options: Any) -> list[Any]:
    images = Generator(bundle).generate(PROMPTS, latents=noise, negative_prompt="", **SETTINGS, **options)
    return [np.asarray(image) for image in images]


def parts(checkpoint: Checkpoint) -> dict[str, Any]:
    assert checkpoint.second
    models = {"transformer": checkpoint.unet, "text_encoder": checkpoint.text_encoder}
    return {name: model.state_dict() for name, model in (models | {"text_encoder_2": checkpoint.second.model}).items()}


def test_merged_weights_follow_the_formula(folder: Path, tmp_path: Path) -> None:
    changes = make_lora(folder, tmp_path / "a.safetensors", form="peft")
    plain = load_base(folder)
    merged = load_base(folder, None, BaseOptions.of(lora=[f"{tmp_path / 'a.safetensors'}:0.5"]))
    changed = set()
    for part, before in parts(plain).items():
        after = parts(merged)[part]
        assert before.keys() == after.keys()
        for name, weight in before.items():
            change = changes.get((part, name))
            changed |= set() if change is None else {(part, name)}
            expected = weight if change is None else weight + 0.5 * change
            torch.testing.assert_close(after[name], expected, msg=f"{part} {name}")
    assert changed == set(changes) and {part for part, _ in changed} == {
        "transformer",
        "text_encoder",
        "text_encoder_2",
    }
    assert plain.shared and not merged.shared  # search keeps CLIP's tower


@pytest.mark.parametrize("inside", ["", "transformer"])
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_adapter_folders_equal_the_merge_of_peft(folder: Path, tmp_path: Path, inside: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(r=3, lora_alpha=5, target_modules=["to_q", "add_k_proj", "ff.net.2", "proj_out"])
    model: Any = get_peft_model(load_base(folder).unet, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(tmp_path / "adapter" / inside)
    peft: Any = PeftModel.from_pretrained(load_base(folder).unet, tmp_path / "adapter" / inside)  # type: ignore[arg-type]
    ours = load_base(folder, None, BaseOptions.of(lora=[tmp_path / "adapter"])).unet.state_dict()
    for name, weight in peft.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], weight, atol=1e-6, rtol=1e-5, msg=name)


def test_files_of_kohya_and_of_other_models_are_refused(folder: Path, random_checkpoint: Path, tmp_path: Path) -> None:
    make_lora(folder, tmp_path / "a.safetensors", form="kohya")
    with pytest.raises(CheckpointError, match="diffusers does not read the format of kohya for this model"):
        load_base(folder, None, BaseOptions.of(lora=[tmp_path / "a.safetensors"]))
    make_lora(random_checkpoint, tmp_path / "b.safetensors", form="peft")
    with pytest.raises(CheckpointError, match=r"unet\..* \(no such layer\)"):
        load_base(folder, None, BaseOptions.of(lora=[tmp_path / "b.safetensors"]))


@pytest.mark.slow
def test_bundle_with_a_merged_lora_equals_diffusers(folder: Path, tmp_path: Path) -> None:
    make_lora(folder, folder.parent / "merged.safetensors", form="peft", seed=3)
    export = export_bundle(folder, tmp_path / "bundle", lora=[f"{folder.parent / 'merged.safetensors'}:0.5"])
    expected = images_of_diffusers(folder, merged=0.5)
    ours = generated(Bundle.open(export.path, threads=1), expected.noise)
    assert min(map(psnr_db, ours, expected.images)) > 50
    assert max(map(psnr_db, images_of_diffusers(folder).images, expected.images)) < 40, "the LoRA changes the images"


def test_switchable_loras_equal_those_of_diffusers(folder: Path, tmp_path: Path) -> None:
    make_lora(folder, folder.parent / "shoes.safetensors", form="peft", seed=1)
    make_lora(folder, folder.parent / "light.safetensors", form="diffusers", text=False, seed=2)
    files = [folder.parent / f"{name}.safetensors" for name in ("shoes", "light")]
    export = export_bundle(folder, tmp_path / "bundle", lora=files, lora_switchable=True)
    bundle = Bundle.open(export.path, threads=1)
    for weights in ({}, {"shoes": 1.0}, {"shoes": 0.4, "light": -0.7}):
        expected = images_of_diffusers(folder, **weights)
        ours = generated(bundle, expected.noise, **({"lora": weights} if weights else {}))
        assert min(map(psnr_db, ours, expected.images)) > 50, weights
