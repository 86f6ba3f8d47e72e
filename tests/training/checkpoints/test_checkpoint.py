"""Checkpoints: saved ones load here and in the libraries, and broken ones are refused with a reason."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import StableDiffusionPipeline  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from support.modes import modes_below, umask  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from unidiff_sdk.errors import CheckpointError  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.saving import save_checkpoint  # noqa: E402

COMPAT = Path(__file__).parents[2] / "compat"
PARTS = ("unet", "vae", "clip", "text_encoder", "tokenizer", "scheduler", "image_processor", "meta")


def parts(checkpoint: Checkpoint) -> dict:
    return {name: getattr(checkpoint, name) for name in PARTS}


@pytest.fixture
def copy(random_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_checkpoint, tmp_path / "copy"))


def test_text_encoder_shares_the_tower_of_clip(random_checkpoint: Path) -> None:
    loaded = load_checkpoint(random_checkpoint)
    assert loaded.shared
    with torch.no_grad():
        loaded.clip.text_model.state_dict()["final_layer_norm.weight"].fill_(7.0)
    tensors = loaded.text_encoder.state_dict()
    assert next(t for name, t in tensors.items() if name.endswith("final_layer_norm.weight")).eq(7.0).all()
    assert (loaded.image_size, loaded.latent_factor) == (32, 2)


def test_separate_text_encoder_stays_separate(copy: Path) -> None:
    weights = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    tensors["text_model.final_layer_norm.weight"] += 1.0
    save_file(tensors, weights, metadata={"format": "pt"})
    loaded = load_checkpoint(copy)
    assert not loaded.shared
    saved = save_checkpoint(copy, **parts(loaded))
    assert load_file(saved / "text_encoder" / "model.safetensors").keys() == tensors.keys()
    assert not load_checkpoint(saved).shared


def test_libraries_load_every_tensor(random_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(random_checkpoint)
    saved = save_checkpoint(tmp_path / "deep" / "saved", **parts(loaded))
    pipeline = StableDiffusionPipeline.from_pretrained(saved)
    clip, info = CLIPModel.from_pretrained(saved / "clip", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = {"unet": loaded.unet, "vae": loaded.vae, "text_encoder": loaded.text_encoder, "clip": loaded.clip}
    theirs = {"unet": pipeline.unet, "vae": pipeline.vae, "text_encoder": pipeline.text_encoder, "clip": clip}
    for name, model in ours.items():
        tensors = theirs[name].state_dict()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in model.state_dict().items()), name
    assert pipeline("a red dress", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_text_encoder_keys_have_the_prefix_and_tokenizers_have_all_files(random_checkpoint: Path) -> None:
    keys = load_file(random_checkpoint / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)
    for folder in ("tokenizer", "clip"):
        present = {file.name for file in (random_checkpoint / folder).iterdir()}
        assert {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json"} <= present


def test_half_precision_weights_load_as_float(random_checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(random_checkpoint)
    saved = save_checkpoint(tmp_path / "half", **parts(loaded), dtype=torch.float16)
    stored = load_file(saved / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = load_checkpoint(saved)
    assert again.shared
    for model in (again.unet, again.vae, again.clip):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert StableDiffusionPipeline.from_pretrained(saved).text_encoder.dtype == torch.float32
    assert loaded.unet.dtype == torch.float32, "saving does not change the model"


def test_no_path_of_this_machine_is_written(random_checkpoint: Path, tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path / "saved", **parts(load_checkpoint(random_checkpoint)))
    for file in saved.rglob("*.json"):
        assert str(random_checkpoint) not in file.read_text(encoding="utf-8"), file


@pytest.mark.parametrize("mask", [0o077, 0o022, 0o007])
def test_files_of_a_checkpoint_follow_the_umask(random_checkpoint: Path, tmp_path: Path, mask: int) -> None:
    def write_more(folder: Path) -> None:
        (folder / "training_state").mkdir()
        save_file({"a": torch.zeros(1)}, folder / "training_state" / "optimizer.safetensors")

    with umask(mask):
        saved = save_checkpoint(tmp_path / "saved", **parts(load_checkpoint(random_checkpoint)), write_more=write_more)
    assert modes_below(saved) == ({0o666 & ~mask}, {0o777 & ~mask})


def test_metadata_is_loaded(random_checkpoint: Path) -> None:
    meta = load_checkpoint(random_checkpoint).meta
    assert meta["format"] == "unidiff-checkpoint" and meta["name"] == "random" and meta["synthetic"] is True


@pytest.mark.parametrize("part", ["unet/config.json", "clip/config.json", "tokenizer/tokenizer_config.json"])
def test_missing_part_is_named(copy: Path, part: str) -> None:
    (copy / part).unlink()
    with pytest.raises(CheckpointError, match=part):
        load_checkpoint(copy)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder"):
        load_checkpoint(tmp_path / "nowhere")


def test_missing_tensor_is_refused(copy: Path) -> None:
    weights = copy / "clip" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["visual_projection.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight"):
        load_checkpoint(copy)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").rename(copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="Only safetensors"):
        load_checkpoint(copy)


def test_truncated_weights_are_refused(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="Cannot read"):
        load_checkpoint(copy)


def test_unreadable_json_is_refused(copy: Path) -> None:
    (copy / "unidiff.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"unidiff\.json"):
        load_checkpoint(copy)


def test_folder_that_is_not_a_checkpoint_is_not_replaced(random_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        save_checkpoint(tmp_path, **parts(load_checkpoint(random_checkpoint)))
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "precious"


def test_failed_save_leaves_the_previous_checkpoint(copy: Path) -> None:
    loaded = load_checkpoint(copy)
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}

    class FullDisk:
        """An image processor that cannot be written, after the models were."""

        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(copy, **(parts(loaded) | {"image_processor": FullDisk()}))
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name], "no incomplete folder is left"


def test_new_checkpoint_replaces_the_previous_one(copy: Path) -> None:
    saved = save_checkpoint(copy, **(parts(load_checkpoint(copy)) | {"meta": {"run": 2}}))
    assert json.loads((saved / "unidiff.json").read_text(encoding="utf-8"))["run"] == 2
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
def test_compatibility_check_passes_on_the_installed_versions(
    random_checkpoint: Path, tmp_path: Path, half: bool
) -> None:
    dtype = torch.float16 if half else None
    saved = save_checkpoint(tmp_path / "saved", **parts(load_checkpoint(random_checkpoint)), dtype=dtype)
    check_compatibility(sys.executable, saved)


@pytest.mark.slow
@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
def test_older_libraries_load_every_tensor(random_checkpoint: Path, tmp_path: Path, half: bool) -> None:
    """transformers 4.57 and diffusers 0.36, in a separate environment that is kept for later runs."""
    environment = COMPAT.parents[1] / ".venv-compat"
    python = environment / "bin" / "python"
    if not (environment / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", COMPAT / "requirements.txt"], check=True)
        (environment / ".ready").touch()
    dtype = torch.float16 if half else None
    check_compatibility(
        python, save_checkpoint(tmp_path / "saved", **parts(load_checkpoint(random_checkpoint)), dtype=dtype)
    )


def check_compatibility(python: str | Path, checkpoint: Path) -> None:
    run = subprocess.run([python, COMPAT / "check_checkpoint.py", checkpoint], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("vae/config.json", '"linear"'),
        ("clip/config.json", '"org/name"'),
        ("unet/config.json", "7"),
        ("vae/config.json", '{"layers_per_block": 9223372036854775808}'),
        ("clip/config.json", '{"text_config": {"num_hidden_layers": 5000}}'),
        ("unet/config.json", '{"cross_attention_dim": [1000000000]}'),
        ("tokenizer/tokenizer_config.json", "[" * 5000),
        ("scheduler/scheduler_config.json", '{"_class_name": {}}'),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": ' + "9" * 5000 + "}"),
        ("text_encoder/config.json", '{"model_type": "\\ud800"}'),
    ],
)
def test_configuration_that_is_no_object_is_refused_without_asking_the_hub(
    random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    """diffusers takes a configuration that is a string for the name of a model on the hub."""
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **options: asked.append(address))
    folder = shutil.copytree(random_checkpoint, tmp_path / "copy")
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    assert asked == []
