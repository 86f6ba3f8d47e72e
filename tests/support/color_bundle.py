"""A bundle whose encoders embed the average color of an image and the color words of a text: results are predictable.

The graphs are real ones, so a catalog needs no stand-in. The generator is that of the toy bundle.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.toy_bundle import DIM as STATE_DIM
from support.toy_bundle import INPUTS, make_toy_bundle, seal

COLORS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (220, 200, 20)}
OTHER_WORD = (1, 1, 1)  # nearly no weight next to a color
SPECIAL = ("!", "<|startoftext|>", "<|endoftext|>", "<|unknown|>")


def color_image(color: str | tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, COLORS[color] if isinstance(color, str) else color)


def make_color_bundle(folder: Path, *, dim: int = 4, variant: int = 0, synthetic: bool = False) -> Path:
    """Write the bundle; another `variant` has another fingerprint and the same embeddings."""
    shutil.rmtree(folder, ignore_errors=True)
    make_toy_bundle(folder, name=folder.name, synthetic=synthetic)
    _write_text_encoder(folder, dim, 1.0 + variant)
    _write_image_encoder(folder, dim, 1.0 + variant)
    _write_tokenizer(folder / "tokenizer" / "tokenizer.json")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["embedding"]["dim"] = dim
    seal(folder, {key: value for key, value in manifest.items() if key not in ("files", "fingerprint", "checksum")})
    return folder


def _write_text_encoder(folder: Path, dim: int, scale: float) -> None:
    """Each token is embedded as its color; special tokens as zero. A text is the mean of its tokens."""
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    table = np.zeros((len(SPECIAL) + len(COLORS), STATE_DIM), np.float32)
    table[SPECIAL.index("<|unknown|>"), :3] = OTHER_WORD
    table[len(SPECIAL) :, :3] = list(COLORS.values())
    nodes = [
        onnx.helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
        onnx.helper.make_node("ReduceMean", ["last_hidden_state"], ["mean"], axes=[1], keepdims=0),
        onnx.helper.make_node("MatMul", ["mean", "projection"], ["text_embeds"]),
    ]
    shapes = {"last_hidden_state": ["batch", "tokens", STATE_DIM], "text_embeds": ["batch", dim]}
    _write_graph(folder, "text_encoder", shapes, nodes, table=table, projection=scale * np.eye(STATE_DIM, dim))


def _write_image_encoder(folder: Path, dim: int, scale: float) -> None:
    """An image is embedded as its average color, 0 to 255; pixel values range from -1 to 1."""
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["pixel_values"], ["mean"]),
        onnx.helper.make_node("Flatten", ["mean"], ["flat"]),
        onnx.helper.make_node("Gemm", ["flat", "weight", "bias"], ["image_embeds"]),
    ]
    weight = scale * 127.5 * np.eye(3, dim, dtype=np.float32)
    _write_graph(folder, "image_encoder", {"image_embeds": ["batch", dim]}, nodes, weight=weight, bias=weight.sum(0))


def _write_graph(folder: Path, name: str, outputs: dict[str, list[Any]], nodes: list[Any], **weights: Any) -> None:
    onnx = pytest.importorskip("onnx", reason="needs the export extra")
    kinds = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64}
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        name,
        [value(key, kinds[given["dtype"]], given["shape"]) for key, given in INPUTS[name].items()],
        [value(key, onnx.TensorProto.FLOAT, shape) for key, shape in outputs.items()],
        [onnx.numpy_helper.from_array(array.astype(np.float32), key) for key, array in weights.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, folder / name / "model.onnx")


def _write_tokenizer(file: Path) -> None:
    """One token per word, with CLIP's start and end tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    _, start, end, unknown = SPECIAL
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *COLORS])}, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, SPECIAL.index(end)), (start, SPECIAL.index(start)), False, False
    )
    tokenizer.save(str(file))
