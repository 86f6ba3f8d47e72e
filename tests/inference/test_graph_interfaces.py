"""Graphs of another model, that read other files, or that fail: a BundleError, at open if possible."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.folder.onnx_file import read_onnx_file
from unidiff_sdk.inference.sessions import create_session

onnx = pytest.importorskip("onnx", reason="needs the export extra")


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def reseal(folder: Path, change: Callable[[dict[str, Any]], Any] = lambda manifest: None) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    seal(folder, manifest)


def edit(folder: Path, graph: str, change: Callable[[Any], Any], **save: Any) -> None:
    """Change a graph, and write a manifest with valid hashes."""
    file = folder / graph / "model.onnx"
    model = onnx.load(file)
    change(model.graph)
    onnx.save(model, file, **save)
    reseal(folder)


def axis(values: Any, name: str, index: int) -> Any:
    (value,) = [value for value in values if value.name == name]
    return value.type.tensor_type.shape.dim[index]


def set_dtype(values: Any, dtype: int) -> None:
    values[0].type.tensor_type.elem_type = dtype


@pytest.mark.parametrize("graph", ["text_encoder", "image_encoder", "unet", "vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("folder", ["toy", "tiny"])
def test_file_states_what_onnx_runtime_reports(tmp_path: Path, graph: str, folder: str) -> None:
    path = (TINY if folder == "tiny" else make_toy_bundle(tmp_path / "toy")) / graph / "model.onnx"
    read, session = read_onnx_file(path), create_session(path, threads=1)
    assert read.inputs == session.inputs and read.outputs == session.outputs
    assert read.operators == {node.op_type for node in onnx.load(path).graph.node} and not read.external_files


@pytest.mark.parametrize(
    ("graph", "change", "message"),
    [
        ("unet", lambda g: setattr(axis(g.input, "sample", 1), "dim_value", 9), r"input sample float32\[batch, 9, "),
        ("unet", lambda g: setattr(axis(g.input, "sample", 1), "dim_param", "c"), r"input sample float32\[batch, c, "),
        ("unet", lambda g: setattr(axis(g.input, "encoder_hidden_states", 2), "dim_value", 7), r"tokens, 7\]"),
        ("unet", lambda g: setattr(axis(g.output, "out_sample", 1), "dim_value", 3), r"output out_sample .*, 3, "),
        ("unet", lambda g: setattr(axis(g.input, "sample", 0), "dim_value", 1), r"input sample float32\[1, "),
        ("unet", lambda g: g.input.pop(), "has the inputs sample, timestep, but"),
        ("unet", lambda g: g.input.append(onnx.helper.make_tensor_value_info("mask", 1, ["b"])), "has the inputs"),
        ("text_encoder", lambda g: set_dtype(g.input, onnx.TensorProto.INT32), r"input input_ids int32\[batch"),
        ("text_encoder", lambda g: g.output.pop(), "has the outputs last_hidden_state, but"),
        ("text_encoder", lambda g: setattr(axis(g.output, "text_embeds", 1), "dim_value", 512), r"\[batch, 512\]"),
        ("text_encoder", lambda g: setattr(axis(g.output, "last_hidden_state", 2), "dim_value", 9), "width 8, but"),
        ("image_encoder", lambda g: setattr(axis(g.input, "pixel_values", 2), "dim_value", 224), r"3, 224, 16\]"),
        ("vae_decoder", lambda g: g.output[0].type.tensor_type.ClearField("shape"), "output sample without a shape"),
        ("vae_decoder", lambda g: g.input[0].type.tensor_type.shape.dim.pop(), r"latent_sample float32\[batch, 4, "),
        ("vae_encoder", lambda g: set_dtype(g.output, onnx.TensorProto.FLOAT16), "latent_sample float16"),
    ],
)
def test_graph_of_another_interface_is_refused_at_open(
    toy: Path, graph: str, change: Callable[[Any], Any], message: str
) -> None:
    edit(toy, graph, change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(toy)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["embedding"].update(dim=9),
        lambda m: m["image"].update(size=32),
        lambda m: m["latent"].update(channels=16),
        lambda m: m["graphs"]["unet"]["inputs"]["sample"].update(dtype="float16"),
        lambda m: m["graphs"].update(unet=m["graphs"]["vae_encoder"]),
    ],
)
def test_manifest_of_other_sizes_is_refused_at_open(toy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    reseal(toy, change)
    with pytest.raises(BundleError, match=r"the graph \w+ has the (input|output)"):
        Bundle.open(toy)


def store_externally(folder: Path, location: str) -> None:
    """Store the weights of the UNet in unet/weights.bin, and name `location` as their place."""
    edit(folder, "unet", lambda graph: None, save_as_external_data=True, location="weights.bin", size_threshold=0)
    model = onnx.load(folder / "unet" / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    onnx.save(model, folder / "unet" / "model.onnx")
    reseal(folder)


def test_listed_external_weights_are_used_and_checked(toy: Path) -> None:
    store_externally(toy, "weights.bin")
    assert read_onnx_file(toy / "unet" / "model.onnx").external_files == {"weights.bin"}
    bundle = Bundle.open(toy)
    weights = toy / "unet" / "weights.bin"
    weights.write_bytes(bytes(len(weights.read_bytes())))
    with pytest.raises(BundleError, match=r"weights\.bin: was changed after the export"):
        bundle.session("unet")


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/passwd", "sub/weights.bin", "*/_ORT_MEM_ADDR_/*", "", ".", "a\x00", "unlisted"]
)
@pytest.mark.parametrize("verify", [True, False])
def test_other_external_weights_are_refused(toy: Path, location: str, verify: bool) -> None:
    store_externally(toy, location)
    (toy / "unet" / "unlisted").write_bytes(bytes(2000))
    with pytest.raises(BundleError, match=r"is not the name of a file next to it|is not listed in the manifest"):
        Bundle.open(toy, verify=verify).session("unet")


def test_weights_in_attributes_and_subgraphs_are_found(toy: Path) -> None:
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../w")
    inner = onnx.helper.make_graph([onnx.helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner)
    edit(toy, "unet", lambda graph: graph.node.append(node))
    with pytest.raises(BundleError, match=r"its weights are in '\.\./w'"):
        Bundle.open(toy)


def test_operator_that_loads_files_is_refused(toy: Path) -> None:
    node = onnx.helper.make_node(
        "EPContext", ["sample"], ["y"], domain="com.microsoft", ep_cache_context="/elsewhere/x"
    )
    edit(toy, "unet", lambda graph: graph.node.append(node))
    with pytest.raises(BundleError, match="the operator EPContext is not allowed"):
        Bundle.open(toy)


@pytest.mark.parametrize("content", [b"", b"\x00", b"ORTM" * 10, b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x02\x08\x01"])
def test_file_that_is_not_onnx_is_refused_at_open(toy: Path, content: bytes) -> None:
    (toy / "unet" / "model.onnx").write_bytes(content)
    reseal(toy)
    with pytest.raises(BundleError, match="cannot load this graph, as it is not ONNX"):
        Bundle.open(toy)


def test_failing_call_is_a_bundle_error(toy: Path) -> None:
    def reach_out(graph: Any) -> None:
        (table,) = graph.initializer
        table.CopyFrom(onnx.numpy_helper.from_array(np.zeros((1, 8), np.float32), table.name))

    edit(toy, "text_encoder", reach_out)
    with pytest.raises(BundleError, match=r"text_encoder.model\.onnx: ONNX Runtime cannot run this graph"):
        Encoder(Bundle.open(toy)).encode_text("a coat")


MUTATIONS = 120
TRIAL = """
import sys, warnings
from pathlib import Path
import numpy as np
from unidiff_sdk.errors import UniDiffError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder

warnings.simplefilter("ignore")
for folder in sys.stdin.read().splitlines():
    image = np.full((20, 20, 3), 90, np.uint8)
    try:
        bundle = Bundle.open(folder, threads=1)
        Encoder(bundle).encode_text("a coat")
        Encoder(bundle).encode_images([image])
        Generator(bundle).generate("a coat", steps=4, like=image)
        print("valid")
    except UniDiffError:
        print("refused")
"""


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The bytes after one to four changes: a flipped bit, other bytes, bytes removed, inserted or repeated."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4])):
        start, length = rng.randrange(len(data)), rng.randrange(1, 9)
        match rng.randrange(5):
            case 0:
                data[start] ^= 1 << rng.randrange(8)
            case 1:
                data[start : start + length] = rng.randbytes(length)
            case 2:
                del data[start : start + length]
            case 3:
                data[start:start] = rng.randbytes(length)
            case 4:
                data[start:start] = data[start : start + length]
    return bytes(data)


def test_mutated_graphs_with_valid_hashes_raise_no_foreign_error(tmp_path: Path) -> None:
    """In a child process, because ONNX Runtime could crash."""
    toy, folders = make_toy_bundle(tmp_path / "toy"), []
    originals = {file: file.read_bytes() for file in sorted(toy.glob("*/model.onnx"))}
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        file = rng.choice(list(originals))
        folder = tmp_path / str(seed)
        folder.mkdir()
        for path in [path for path in toy.rglob("*") if path.is_file() and path.name != "manifest.json"]:
            copy = folder / path.relative_to(toy)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(mutated(originals[file], rng) if path == file else path.read_bytes())
        seal(folder, json.loads((toy / "manifest.json").read_text()))
        folders.append(str(folder))
    child = subprocess.run(
        [sys.executable, "-c", TRIAL], input="\n".join(folders), capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr[-2000:]
    results = child.stdout.splitlines()
    assert len(results) == MUTATIONS and {"valid", "refused"} == set(results)
