"""Bases: text layers that Stable Diffusion and CLIP share, unsupported models, and hub ids."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import StableDiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from unidiff_sdk.errors import CheckpointError  # noqa: E402
from unidiff_sdk.inference.preprocessing import preprocess  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.encoders.image_preprocessing import preprocessing_refusal  # noqa: E402
from unidiff_sdk.training.checkpoints.encoders.open_clip import load_open_clip  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import save_checkpoint  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.objective.batch import Batch  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402

COMPAT = Path(__file__).parents[2] / "compat"


@pytest.fixture
def separate(random_checkpoint: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a diffusers folder, a transformers CLIP folder) as on the hub, without any file of this project."""
    pipeline, clip = tmp_path / "sd", tmp_path / "clip"
    shutil.copytree(random_checkpoint / "clip", clip)
    shutil.copytree(random_checkpoint, pipeline, ignore=shutil.ignore_patterns("clip", "unidiff.json"))
    return pipeline, clip


def remove_last_layer(pipeline: Path) -> None:
    """As in Stable Diffusion 2.x: the text encoder lacks the last layer of CLIP's text tower."""
    file, config = (pipeline / "text_encoder" / name for name in ("model.safetensors", "config.json"))
    content = json.loads(config.read_text(encoding="utf-8"))
    content["num_hidden_layers"] -= 1
    config.write_text(json.dumps(content), encoding="utf-8")
    last = f"layers.{content['num_hidden_layers']}."
    save_file({name: t for name, t in load_file(file).items() if last not in name}, file, metadata={"format": "pt"})


def change(pipeline: Path, tensor: str) -> None:
    file = pipeline / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"text_model.{tensor}"] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})


def test_pipeline_and_its_clip_share_the_whole_tower(separate: tuple[Path, Path]) -> None:
    checkpoint = load_base(*separate)
    assert checkpoint.shared and (checkpoint.shared_layers, checkpoint.conditioning_layer) == (2, -1)
    assert "shares 2 of its 2 layers with CLIP (2 layers)" in checkpoint.describe_sharing()


def test_stable_diffusion_2_is_conditioned_by_the_second_to_last_layer(separate: tuple[Path, Path]) -> None:
    remove_last_layer(separate[0])
    checkpoint = load_base(*separate)
    assert not checkpoint.shared and (checkpoint.shared_layers, checkpoint.conditioning_layer) == (1, -2)
    assert "second-to-last layer of CLIP conditions the UNet" in checkpoint.describe_sharing()
    model = JointModel(checkpoint).eval()
    ids = tokenize(checkpoint.tokenizer, ["a red dress", "green boots"])
    batch = Batch(torch.rand(2, 3, 32, 32), torch.randn(2, 4, 16, 16), ids, torch.arange(2))
    empty = tokenize(checkpoint.tokenizer, [""])
    conditions, pooled = model.encode_captions(batch, torch.tensor([False, True]), empty, pooled=True)
    theirs = StableDiffusionPipeline.from_pretrained(separate[0]).text_encoder
    expected = theirs(torch.cat([ids[:1], empty])).last_hidden_state
    torch.testing.assert_close(conditions.states, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pooled, checkpoint.clip.text_model(ids).pooler_output)
    conditions.states.sum().backward()
    assert checkpoint.clip.text_model.encoder.layers[0].mlp.fc1.weight.grad is not None


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (
            "unet/config",
            {"addition_embed_type": "text_time"},
            r"inputs \(addition_embed_type text_time\), as",
        ),
        ("unet/config", {"in_channels": 9}, r"additional inputs \(in_channels 9: inpainting\)"),
        ("unet/config", {"in_channels": 8}, r"\(in_channels 8: InstructPix2Pix\)"),
        ("unet/config", {"class_embed_type": "timestep"}, r"\(class_embed_type timestep\)"),
        ("unet/config", {"time_cond_proj_dim": 256}, r"\(time_cond_proj_dim 256\)"),
        (
            "unet/config",
            {"out_channels": 8},
            "takes 4 channels and returns 8, as models do that also",
        ),
        ("unet/config", {"sample_size": [16, 24]}, r"sample_size is \[16, 24\]; it must be one number"),
        ("unet/config", {"sample_size": None}, "sample_size is None; it must be one number"),
        ("unet/config", {"cross_attention_dim": 768}, "states of width 768, but text_encoder/ returns 32"),
        (
            "unet/config",
            {"_class_name": "UNet3DConditionModel"},
            "_class_name is 'UNet3DConditionModel', but only",
        ),
        ("vae/config", {"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny', but only AutoencoderKL"),
        ("vae/config", {"latents_mean": [0.0] * 4}, "the VAE states latents_mean, which diffusers' Stable Diffusion"),
        ("text_encoder/config", {"model_type": "t5"}, "model_type is 't5', but only clip_text_model and clip"),
        (
            "tokenizer/tokenizer_config",
            {"tokenizer_class": "T5Tokenizer"},
            "tokenizer_class is 'T5Tokenizer', but",
        ),
        (
            "tokenizer/tokenizer_config",
            {"padding_side": "left"},
            "pads on the left, but CLIP reads prompts",
        ),
        (
            "tokenizer/tokenizer_config",
            {"model_max_length": 8},
            "model_max_length is 8, but the text encoder has",
        ),
        ("clip/config", {"model_type": "siglip"}, "model_type is 'siglip', but only clip can be loaded"),
        ("clip/tokenizer_config", {"tokenizer_class": "SiglipTokenizer"}, "tokenizer_class is 'SiglipTokenizer'"),
        (
            "clip/preprocessor_config",
            {"image_processor_type": "SiglipImageProcessor"},
            "'SiglipImageProcessor' is not",
        ),
        (
            "clip/preprocessor_config",
            {"image_processor_type": "ViTImageProcessor"},
            "'ViTImageProcessor' is not",
        ),
        (
            "scheduler/scheduler_config",
            {"prediction_type": "sample"},
            "predicts 'sample'. Training supports",
        ),
        ("text_encoder/config", {"vocab_size": "many"}, "is 'many'; it must be an integer from 1"),
        ("text_encoder/config", {"vocab_size": [100]}, "must be an integer from 1"),
        ("scheduler/scheduler_config", {"timestep_spacing": "odd"}, "timestep_spacing 'odd' is not supported"),
        ("scheduler/scheduler_config", {"beta_schedule": "laplace"}, "beta_schedule 'laplace' is not supported"),
        ("scheduler/scheduler_config", {"thresholding": True}, "thresholding is not supported"),
        ("scheduler/scheduler_config", {"num_train_timesteps": "many"}, "num_train_timesteps is 'many'; it must be"),
        ("scheduler/scheduler_config", {"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be an integer"),
        ("scheduler/scheduler_config", {"trained_betas": []}, "trained_betas is .*; it must be a list"),
        (
            "text_encoder/config",
            {"vocab_size": 100},
            "tokens, but its text encoder embeds 100. Remove the added tokens",
        ),
        (
            "scheduler/scheduler_config",
            {"_class_name": "LMSDiscreteScheduler"},
            "requires the scipy library",
        ),
    ],
)
def test_unsupported_models_are_refused_by_what_their_files_state(
    random_checkpoint: Path, tmp_path: Path, file: str, changes: dict[str, Any], message: str
) -> None:
    if "LMSDiscreteScheduler" in changes.values() and find_spec("scipy"):
        pytest.skip("scipy is installed")
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    change_json(base / f"{file}.json", changes)
    with pytest.raises(CheckpointError, match=message):
        load_base(base)


def change_json(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.mark.parametrize(("sample_size", "version", "side"), [([16, 16], "0.30.0", 16), (16, "0.6.0", 64)])
def test_side_of_the_latents_is_read_as_by_diffusers(
    random_checkpoint: Path, tmp_path: Path, sample_size: Any, version: str, side: int
) -> None:
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    change_json(base / "unet" / "config.json", {"sample_size": sample_size, "_diffusers_version": version})
    assert load_base(base).image_size == 2 * side
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    theirs = pipeline.unet.config.sample_size
    assert (theirs[0] if isinstance(theirs, (list, tuple)) else theirs) == side


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("model_cfg", {"vision_cfg": {"layers": [3, 4, 6, 3], "image_size": 32}}, "ModifiedResNet as image tower"),
        ("model_cfg", {"text_cfg": {"hf_tokenizer_name": "t5"}}, "sets hf_tokenizer_name"),
        ("preprocess_cfg", {"resize_mode": "longest"}, "images with resize_mode 'longest', which is not supported"),
        ("preprocess_cfg", {"interpolation": "random"}, "images with interpolation 'random'"),
        ("preprocess_cfg", {"size": [64, 64]}, "images with size 64, which is not supported, only 32"),
    ],
)
def test_open_clip_models_that_transformers_does_not_follow_are_refused(
    tmp_path: Path, file: str, change: dict[str, Any], message: str
) -> None:
    tower = {"layers": 1, "width": 64, "head_width": 32}
    config = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": tower | {"image_size": 32, "patch_size": 16},
            "text_cfg": {"layers": 1, "width": 32, "heads": 2, "vocab_size": 100, "context_length": 8},
        },
        "preprocess_cfg": {"size": [32, 32], "resize_mode": "shortest"},
    }
    config[file] = config[file] | change
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"x": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_open_clip(f"open_clip:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}, "the scheduler 'FlowMatchEulerDiscreteScheduler' is not supported"),
        ("EDMEulerScheduler", {}, "the scheduler 'EDMEulerScheduler' is not supported"),
        ("TCDScheduler", {}, "the scheduler 'TCDScheduler' is not supported: it is made for models distilled for it"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous"},
            "timestep_type 'continuous' of the scheduler Euler",
        ),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "use_flow_sigmas True of the scheduler UniPC"),
    ],
)
def test_schedulers_that_the_runtime_does_not_follow_are_refused_by_name(
    random_checkpoint: Path, tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.30.0"} | options), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        load_base(base)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("LCMScheduler", {}, {"name": "lcm", "steps": 4, "guidance_scale": 1.0}),
        ("EulerAncestralDiscreteScheduler", {}, {"name": "euler_a"}),
        (
            "EulerAncestralDiscreteScheduler",  # SDXL Turbo
            {"timestep_spacing": "trailing"},
            {"name": "euler_a", "steps": 4, "guidance_scale": 1.0},
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
            {"name": "euler"},
        ),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"name": "ddim"}),
        ("EulerDiscreteScheduler", {}, {"name": "euler"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, {"name": "euler_karras"}),
        ("DDIMScheduler", {}, {"name": "ddim"}),
        ("DPMSolverMultistepScheduler", {}, {"name": "dpm++2m"}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, {"name": "dpm++2m_karras"}),
        ("PNDMScheduler", {}, {"name": "dpm++2m"}),
    ],
)
def test_sampler_of_the_base_is_followed_unless_the_metadata_names_another(
    random_checkpoint: Path, tmp_path: Path, name: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.30.0"} | options), encoding="utf-8")
    checkpoint = load_base(base)
    assert checkpoint.sampler_defaults == {"steps": 20, "guidance_scale": 5.0} | expected
    recorded = replace(checkpoint, meta={"sampler": {"name": "euler", "steps": 7}})
    assert recorded.sampler_defaults["name"] == "euler" and recorded.sampler_defaults["steps"] == 7
    assert checkpoint.replaced_scheduler == (name if name == "PNDMScheduler" else None)
    assert recorded.replaced_scheduler is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, "size .* is not supported"),
        ({"size": {"shortest_edge": 36}}, "size {'shortest_edge': 36} of the image preprocessing is not supported"),
        ({"do_center_crop": False}, "do_center_crop False of the image preprocessing is not supported, only True"),
        ({"resample": 2}, "resample 2 of the image preprocessing is not supported, only 3"),
        ({"do_resize": False}, "do_resize False"),
    ],
)
def test_other_image_preprocessing_is_refused(
    random_checkpoint: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_base(with_preprocessing(random_checkpoint, tmp_path, change))


@pytest.mark.parametrize(
    "change",
    [{}, {"rescale_factor": 1 / 127.5}, {"do_normalize": False}, {"do_rescale": False}, {"image_std": [0.2, 0.3, 0.4]}],
)
def test_normalization_of_the_image_preprocessing_is_followed(
    random_checkpoint: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    checkpoint = load_base(with_preprocessing(random_checkpoint, tmp_path, change))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 161, 3), dtype=np.uint8))
    expected = checkpoint.image_processor(image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.float32(values) for values in checkpoint.normalization)
    actual = preprocess(image, checkpoint.clip.config.vision_config.image_size, mean, std)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(JointModel(checkpoint).image_std.ravel(), torch.tensor(std))


def with_preprocessing(checkpoint: Path, folder: Path, change: dict[str, Any]) -> Path:
    base = Path(shutil.copytree(checkpoint, folder / "base"))
    file = base / "clip" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | change), encoding="utf-8")
    return base


def test_unsupported_base_is_refused_before_data_is_read(random_checkpoint: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(random_checkpoint, tmp_path / "base"))
    file = base / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prediction_type": "sample"}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="predicts 'sample'"):
        train(tmp_path / "no data", base, tmp_path / "run", TrainingConfig(steps=1), device="cpu")


@pytest.mark.parametrize("rounded", ["text_encoder", "clip"])
@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_towers_that_differ_by_rounding_are_shared_at_the_higher_precision(
    separate: tuple[Path, Path], rounded: str, precision: Any
) -> None:
    pipeline, clip = separate
    noise = torch.Generator().manual_seed(0)
    tensors = {
        name: t * (1 + 1e-4 * torch.rand(t.shape, generator=noise)) if t.is_floating_point() else t
        for name, t in load_file(clip / "model.safetensors").items()
    }
    encoder = pipeline / "text_encoder" / "model.safetensors"
    text = {name: tensors[name] for name in load_file(encoder)}
    half = {name: t.to(precision) for name, t in (text if rounded == "text_encoder" else tensors).items()}
    save_file(half if rounded == "text_encoder" else text, encoder, metadata={"format": "pt"})
    save_file(half if rounded == "clip" else tensors, clip / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load_base(pipeline, clip)
    assert checkpoint.shared
    name = "encoder.layers.1.mlp.fc1.weight"
    (weight,) = (t for key, t in checkpoint.clip.text_model.state_dict().items() if key.endswith(name))
    torch.testing.assert_close(weight, tensors[f"text_model.{name}"], rtol=0, atol=0)


def test_layers_after_the_first_difference_stay_separate(separate: tuple[Path, Path]) -> None:
    change(separate[0], "encoder.layers.1.mlp.fc1.bias")
    checkpoint = load_base(*separate)
    assert (checkpoint.shared_layers, checkpoint.conditioning_layer) == (1, None)
    assert "The other layers stay separate" in checkpoint.describe_sharing()


def test_text_encoders_without_a_common_layer(separate: tuple[Path, Path]) -> None:
    change(separate[0], "embeddings.position_embedding.weight")
    checkpoint = load_base(*separate)
    assert (checkpoint.shared_layers, checkpoint.conditioning_layer) == (0, None)
    assert "share no layer" in checkpoint.describe_sharing()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["whole", "cut", "own"])
@pytest.mark.parametrize("lora", [0, 2])
def test_each_kind_of_base_trains_and_saves(
    separate: tuple[Path, Path], small_catalog: Path, tmp_path: Path, prediction: str, kind: str, lora: int
) -> None:
    pipeline, clip = separate
    if kind == "cut":
        remove_last_layer(pipeline)
    if kind == "own":
        change(pipeline, "encoder.layers.1.mlp.fc1.bias")
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    content = json.loads(scheduler.read_text(encoding="utf-8")) | {"prediction_type": prediction}
    scheduler.write_text(json.dumps(content), encoding="utf-8")
    config = TrainingConfig(steps=1, batch_size=4, warmup_steps=0, learning_rate=1e-2, lora_text=lora, lora_unet=lora)
    out = train(small_catalog, pipeline, tmp_path / "out", config, device="cpu", clip=clip).path
    tuned, base = load_checkpoint(out), load_base(pipeline, clip)
    assert tuned.shared_layers == base.shared_layers and tuned.conditioning_layer == base.conditioning_layer
    name = "encoder.layers.0.self_attn.q_proj.weight"
    layers = [next(t for key, t in c.text_encoder.state_dict().items() if key.endswith(name)) for c in (tuned, base)]
    assert not torch.equal(*layers)
    assert StableDiffusionPipeline.from_pretrained(out).scheduler.config.prediction_type == prediction


def test_base_without_a_clip_is_refused_with_a_suggestion(separate: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match=r"has no CLIP model\. Name one with --clip"):
        load_base(separate[0])
    config = separate[0] / "text_encoder" / "config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"hidden_size": 768}), encoding="utf-8"
    )
    with pytest.raises(CheckpointError, match="openai/clip-vit-large-patch14"):
        load_base(separate[0])


def test_hub_id_that_cannot_be_downloaded_is_an_error(
    separate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="The hub did not provide hf:some/model: no connection"):
        load_base("hf:some/model", separate[1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/shop", "no checkpoint folder runs/shop. Name an existing folder, or write hf:org/name"),
        ("some/model", "no checkpoint folder some/model"),
        ("hf:model", "hf:model is not the name of a model on the hub. Write hf:org/name"),
        ("hf:../model", "not the name of a model"),
        ("hf:some/model@", "not the name of a model"),
    ],
)
def test_missing_path_is_never_asked_of_the_hub(
    separate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    requests: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: requests.append(name))
    for base, clip in ((name, None), (name, separate[1]), (separate[0], name)):
        with pytest.raises(CheckpointError, match=message):
            load_base(base, clip)
    assert requests == []


def test_hub_id_is_downloaded_without_pickles_and_recorded(
    separate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[dict] = []

    def snapshot(name: str, **patterns: list[str]) -> str:
        requests.append({"name": name} | patterns)
        return str(separate[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    checkpoint = load_base("hf:some/model@v1.2", separate[1])
    assert (requests[0]["name"], requests[0]["revision"]) == ("some/model", "v1.2")
    assert checkpoint.shared and checkpoint.name == "some/model"
    assert checkpoint.meta["base_model"] == ["some/model"], "a local CLIP has no hub id"
    assert "*.bin" in requests[0]["ignore_patterns"] and "unet/*" in requests[0]["allow_patterns"]


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("open_clip:nothing", "names no OpenCLIP model. Write open_clip:ARCHITECTURE/TAG"),
        ("nowhere", "no checkpoint folder nowhere"),
    ],
)
def test_unknown_clip_is_refused(separate: tuple[Path, Path], clip: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_base(separate[0], clip)


def test_checkpoint_keeps_both_tokenizers(separate: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint = load_base(*separate)
    shorter = replace(checkpoint, clip_tokenizer=load_base(*separate).clip_tokenizer)
    shorter.clip_tokenizer.model_max_length = 9
    saved = load_checkpoint(save_checkpoint(tmp_path / "saved", **shorter.parts(), meta={}))
    assert (saved.tokenizer.model_max_length, saved.clip_tokenizer.model_max_length) == (16, 9)


@pytest.mark.slow
def test_converted_open_clip_models_equal_open_clip() -> None:
    """In a separate environment that is kept for later runs: open_clip needs a torchvision that matches its torch."""
    environment = COMPAT.parents[1] / ".venv-openclip"
    python = environment / "bin" / "python"
    if not (environment / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        requirements = COMPAT / "requirements-openclip.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
        (environment / ".ready").touch()
    command = [python, COMPAT / "check_open_clip.py"]
    run = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(COMPAT.parents[1])})
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_mean": "x"}, "image_mean 'x' of the image preprocessing is not a list of three numbers"),
        ({"image_std": [1, "x", 1]}, r"image_std \[1, 'x', 1\]"),
        ({"image_std": [1, 0, 1]}, r"image_std \[1, 0, 1\] of the image preprocessing must be above 0"),
        ({"image_std": 7}, "image_std 7"),
        ({"rescale_factor": "x"}, "rescale_factor 'x' of the image preprocessing is not a number above 0"),
        ({"image_mean": [0, 0, 1e300]}, "image_mean"),
        ({"size": [1]}, r"size \[1\] of the image preprocessing is not supported"),
    ],
)
def test_image_preprocessing_of_odd_values_is_refused(change: dict[str, Any], message: str) -> None:
    config = {
        "do_resize": True,
        "size": {"shortest_edge": 32},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    assert preprocessing_refusal(SimpleNamespace(to_dict=lambda: config), 32) is None
    assert re.search(message, preprocessing_refusal(SimpleNamespace(to_dict=lambda: config | change), 32) or "")
