"""A bundle with graphs of a few nodes, made without torch in milliseconds, for the tests of the runtime.

Names, shapes and files are those of a real bundle (16 px, latents 4x8x8, embeddings of 8 dimensions, 12 tokens). Its
images depend on the prompt, the noise and the timestep.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unidiff_sdk.inference.manifest import FORMAT, SCHEMA_VERSION, file_sha256, fingerprint_of, manifest_checksum

DIM, TOKENS, IMAGE_SIZE, LATENT_SIZE, CHANNELS = 8, 12, 16, 8, 4
IMAGE, LATENTS = ["batch", 3, "height", "width"], ["batch", CHANNELS, "height", "width"]
STATES = ["batch", "tokens", DIM]
INPUTS = {
    "text_encoder": {"input_ids": {"dtype": "int64", "shape": ["batch", "tokens"]}},
    "image_encoder": {"pixel_values": {"dtype": "float32", "shape": ["batch", 3, IMAGE_SIZE, IMAGE_SIZE]}},
    "unet": {
        "sample": {"dtype": "float32", "shape": LATENTS},
        "timestep": {"dtype": "float32", "shape": ["batch"]},
        "encoder_hidden_states": {"dtype": "float32", "shape": STATES},
    },
    "vae_decoder": {"latent_sample": {"dtype": "float32", "shape": LATENTS}},
    "vae_encoder": {"sample": {"dtype": "float32", "shape": IMAGE}},
}
START, END = "<|startoftext|>", "<|endoftext|>"


def make_toy_bundle(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Write a bundle into `folder`. `changes` replace parts of its manifest before it is sealed."""
    rng = np.random.default_rng(seed)
    _write_graphs(folder, rng)
    _write_tokenizer(folder / "tokenizer")
    _write_json(folder / "unet" / "config.json", {"block_out_channels": [4, 4]})
    _write_json(folder / "vae_decoder" / "config.json", {"block_out_channels": [4, 4]})
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "timestep_spacing": "trailing",
            "prediction_type": "epsilon",
        },
    )
    manifest = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "name": "toy",
        "precision": "fp32",
        "target": "cpu",
        "graphs": {
            name: {"file": f"{name}/model.onnx", "precision": "fp32", "inputs": inputs}
            for name, inputs in INPUTS.items()
        },
        "embedding": {"dim": DIM, "shared_text_encoder": True, "max_tokens": TOKENS, "logit_scale": 10.0},
        "image": {"size": IMAGE_SIZE, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "latent": {
            "channels": CHANNELS,
            "size": LATENT_SIZE,
            "scale_factor": IMAGE_SIZE // LATENT_SIZE,
            "scaling_factor": 0.5,
            "shift_factor": 0.0,
        },
        "sampler": {"name": "ddim", "steps": 4, "guidance_scale": 3.0, "prediction_type": "epsilon"},
        "synthetic": True,
    }
    seal(folder, manifest | changes)
    return folder


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest with the hashes of the files in `folder`."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != "manifest.json")
    manifest = manifest | {"files": {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}}
    manifest["fingerprint"] = fingerprint_of(manifest["files"])
    manifest["checksum"] = manifest_checksum(manifest)
    _write_json(folder / "manifest.json", manifest)


def _write_graphs(folder: Path, rng: np.random.Generator) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    helper, floats, ints = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    node, value = helper.make_node, helper.make_tensor_value_info

    def write(name: str, inputs: list[Any], outputs: list[Any], nodes: list[Any], **weights: np.ndarray) -> None:
        initializers = [onnx.numpy_helper.from_array(array, key) for key, array in weights.items()]
        graph = helper.make_graph(nodes, name, inputs, outputs, initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        (folder / name).mkdir(parents=True)
        onnx.save(model, folder / name / "model.onnx")

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    def inputs_of(name: str) -> list[Any]:
        kinds = {"float32": floats, "int64": ints}
        return [value(key, kinds[given["dtype"]], given["shape"]) for key, given in INPUTS[name].items()]

    write(
        "text_encoder",
        inputs_of("text_encoder"),
        [value("last_hidden_state", floats, STATES), value("text_embeds", floats, ["batch", DIM])],
        [
            node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
            node("ReduceMean", ["last_hidden_state"], ["text_embeds"], axes=[1], keepdims=0),
        ],
        table=normal(300, DIM),
    )
    write(
        "image_encoder",
        inputs_of("image_encoder"),
        [value("image_embeds", floats, ["batch", DIM])],
        [
            node("GlobalAveragePool", ["pixel_values"], ["mean"]),
            node("Flatten", ["mean"], ["flat"]),
            node("Gemm", ["flat", "weight", "bias"], ["image_embeds"]),
        ],
        weight=normal(3, DIM),
        bias=normal(DIM),
    )
    write(
        "unet",
        inputs_of("unet"),
        [value("out_sample", floats, LATENTS)],
        [
            node("Conv", ["sample", "kernel"], ["mixed"], pads=[1, 1, 1, 1]),
            node("ReduceMean", ["encoder_hidden_states"], ["prompt"], axes=[1], keepdims=0),
            node("MatMul", ["prompt", "weight"], ["by_prompt"]),
            node("Unsqueeze", ["timestep", "last_axis"], ["time"]),
            node("Mul", ["time", "per_step"], ["by_time"]),
            node("Add", ["by_prompt", "by_time"], ["offset"]),
            node("Unsqueeze", ["offset", "image_axes"], ["everywhere"]),
            node("Add", ["mixed", "everywhere"], ["sum"]),
            node("Tanh", ["sum"], ["out_sample"]),
        ],
        kernel=normal(CHANNELS, CHANNELS, 3, 3) / 6,
        weight=normal(DIM, CHANNELS),
        per_step=np.array(0.001, np.float32),
        last_axis=np.array([1], np.int64),
        image_axes=np.array([2, 3], np.int64),
    )
    write(
        "vae_decoder",
        inputs_of("vae_decoder"),
        [value("sample", floats, IMAGE)],
        [
            node("ConvTranspose", ["latent_sample", "kernel"], ["wide"], strides=[2, 2]),
            node("Tanh", ["wide"], ["sample"]),
        ],
        kernel=normal(CHANNELS, 3, 2, 2) / 4,
    )
    write(
        "vae_encoder",
        inputs_of("vae_encoder"),
        [value("latent_sample", floats, LATENTS)],
        [node("Conv", ["sample", "kernel"], ["latent_sample"], strides=[2, 2])],
        kernel=normal(CHANNELS, 3, 2, 2),
    )


def _write_tokenizer(folder: Path) -> None:
    """CLIP's conventions with single letters as tokens: start token, text, end token; padded with "!" as in SD 2."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = {token: i for i, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters), START, END])}
    tokenizer = Tokenizer(models.BPE(tokens, [], unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing((END, tokens[END]), (START, tokens[START]), False, False)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"pad_token": "!", "eos_token": END})


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


def make_search_bundle(folder: Path, *, seed: int = 0) -> Path:
    """Write a toy bundle without a generator into `folder`."""
    make_toy_bundle(folder, seed=seed)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    for name in ("unet", "vae_decoder", "vae_encoder", "scheduler"):
        shutil.rmtree(folder / name)
        manifest["graphs"].pop(name, None)
    del manifest["latent"], manifest["sampler"], manifest["checksum"]
    seal(folder, manifest)
    return folder
