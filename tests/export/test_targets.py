"""Each target's graphs consist of what its runtime knows, and compute the same on the CPU provider."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from support.contribops import CONTRIB_OPS

from unidiff_export.bundle.files import rewrite_graph, write_graph
from unidiff_export.cli import main
from unidiff_export.graphs.lowering import GraphSpec, check_operators, graph_specs, lower
from unidiff_export.graphs.passes import rewrite_for_cuda
from unidiff_export.options import PRECISIONS, TARGETS, check_options
from unidiff_export.verification import TOLERANCES, compare_graph, expected_outputs
from unidiff_sdk.errors import BundleError, ExportError, OptionError, ProviderError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.sessions import DEVICES, Session, create_session
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

GRAPHS = ["text_encoder", "unet", "vae_decoder", "vae_encoder", "image_encoder"]
# One of each kind of attention: causal, with and without context. The VAE's is another of the UNet's kind.
KINDS = ["text_encoder", "unet", "image_encoder"]

WEB_OPERATORS = re.findall(
    r"\w+",
    """Add ArgMax Cast Concat Conv Cos Div Equal Expand Gather GatherND Gelu Gemm Identity InstanceNormalization
    LayerNormalization MatMul Mul Range Reshape Resize Shape Sigmoid Sin Slice Softmax Split Squeeze Transpose Trilu
    Unsqueeze Where""",
)

Lowered = Callable[[str, str], ir.Model]


@pytest.fixture(scope="module")
def specs(random_checkpoint: Path) -> dict[str, GraphSpec]:
    return {spec.name: spec for spec in graph_specs(load_checkpoint(random_checkpoint))}


@pytest.fixture(scope="module")
def lowered(specs: dict[str, GraphSpec]) -> Lowered:
    """Return a graph for a target; each is lowered once."""
    return cache(lambda target, name: lower(specs[name], TARGETS[target]))


def session(model: ir.Model, file: Path) -> Session:
    ir.save(model, file)
    onnx.checker.check_model(str(file))
    return create_session(file)


def attention_nodes(model: ir.Model, target: str) -> list[ir.Node]:
    return [node for node in model.graph if (node.domain, node.op_type) == TARGETS[target].attention]


@pytest.mark.parametrize("name", GRAPHS)
def test_tensorrt_graphs_use_standard_operators_of_opset_20(
    name: str, lowered: Lowered, specs: dict[str, GraphSpec]
) -> None:
    model = lowered("tensorrt", name)
    assert model.opset_imports[""] <= 20
    assert {node.domain for node in model.graph.all_nodes()} == {""}
    assert not {"Attention", "GroupNormalization"} & {node.op_type for node in model.graph.all_nodes()}
    assert len(attention_nodes(model, "tensorrt")) == specs[name].attention_layers > 0
    for node in model.graph:  # TensorRT's parser requires constants here
        if node.op_type == "InstanceNormalization":
            assert all(value is not None and value.const_value is not None for value in node.inputs[1:])


@pytest.mark.parametrize("name", GRAPHS)
def test_web_graphs_use_operators_that_wasm_and_webgpu_run(
    name: str, lowered: Lowered, specs: dict[str, GraphSpec]
) -> None:
    """The list is that of both providers in onnxruntime-web 1.30."""
    model = lowered("web", name)
    assert model.opset_imports[""] <= 20
    assert {(node.domain, node.op_type) for node in model.graph.all_nodes()} <= {("", each) for each in WEB_OPERATORS}
    assert len(attention_nodes(model, "web")) == specs[name].attention_layers > 0


@pytest.mark.parametrize(
    ("target", "name"), [(t, name) for t in ("tensorrt", "web") for name in GRAPHS] + [("cuda", n) for n in KINDS]
)
def test_graphs_agree_with_pytorch(
    target: str, name: str, lowered: Lowered, specs: dict[str, GraphSpec], tmp_path: Path
) -> None:
    parity = compare_graph(
        session(lowered(target, name), tmp_path / "model.onnx"),
        specs[name],
        TOLERANCES["fp32"],
        expected_outputs(specs[name]),
    )
    assert parity.max_abs_error < 2e-5
    assert parity.cosine > 0.999999


@pytest.mark.parametrize("name", KINDS)
def test_cuda_graphs_use_contrib_attention(name: str, lowered: Lowered, specs: dict[str, GraphSpec]) -> None:
    model = lowered("cuda", name)
    assert model.opset_imports["com.microsoft"] == 1
    nodes = attention_nodes(model, "cuda")
    assert len(nodes) == specs[name].attention_layers > 0
    # Only the text encoder is causal, and no node has a mask.
    assert {node.attributes["unidirectional"].as_int() for node in nodes} == {int(name == "text_encoder")}
    assert {len(node.inputs) for node in nodes} == {3}
    # The transpositions to and from [batch, heads, length, width] have cancelled.
    assert not [node for node in nodes if node.inputs[0].producer().op_type == "Transpose"]


def test_text_encoder_of_opset_23_is_causal_by_flag(lowered: Lowered) -> None:
    nodes = attention_nodes(lowered("cpu", "text_encoder"), "cpu")
    assert [(node.attributes["is_causal"].as_int(), len(node.inputs)) for node in nodes] == [(1, 3)] * 2


def test_lowering_does_not_change_the_model(specs: dict[str, GraphSpec], lowered: Lowered) -> None:
    lowered("cpu", "text_encoder")
    assert specs["text_encoder"].module.tower.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_half_graph_for_cuda(specs: dict[str, GraphSpec], tmp_path: Path) -> None:
    model = lower(specs["unet"], TARGETS["cuda"], half=True)
    assert {node.inputs[0].dtype for node in attention_nodes(model, "cuda")} == {ir.DataType.FLOAT16}
    assert {value.dtype for value in model.graph.inputs} == {ir.DataType.FLOAT}
    half = TOLERANCES["fp16"]
    parity = compare_graph(
        session(model, tmp_path / "model.onnx"), specs["unet"], half, expected_outputs(specs["unet"])
    )
    assert parity.max_abs_error < (half.max_abs_error or 0)


def test_attention_keeps_scale_and_causal_mask() -> None:

    class Layer(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)

    def example(batch: int, scale: int) -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(batch, 3, 5, 8) for _ in range(3))

    spec = GraphSpec("layer", Layer(), 1, {name: {0: "batch"} for name in "qkv"}, ("states",), example)
    model = ir.to_proto(lower(spec, TARGETS["cuda"])).SerializeToString()
    inputs = example(4, 1)
    (ours,) = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(
        None, {name: x.numpy() for name, x in zip("qkv", inputs, strict=True)}
    )
    np.testing.assert_allclose(ours, spec.module(*inputs).numpy(), atol=1e-6)


def test_portable_target_refuses_operators_of_onnx_runtime(lowered: Lowered) -> None:
    check_operators(lowered("cpu", "image_encoder"), TARGETS["portable"], "image_encoder")
    with pytest.raises(
        ExportError,
        match=r"unet contains com.microsoft::MultiHeadAttention. This target allows only operators of ai.onnx",
    ):
        check_operators(lowered("cuda", "unet"), TARGETS["portable"], "unet")
    with pytest.raises(ExportError, match="image_encoder has opset 23 instead of 20"):
        check_operators(lowered("cpu", "image_encoder"), TARGETS["tensorrt"], "image_encoder")


@pytest.mark.parametrize("name", ["unet", "vae_decoder", "vae_encoder"])
def test_channels_last_graphs_agree_with_pytorch(name: str, lowered: Lowered, specs: dict[str, GraphSpec]) -> None:
    """By the definitions of ONNX Runtime's operators, because a CPU has no kernels for them."""
    spec = specs[name]
    model = lowered("cuda", name).clone()
    assert rewrite_for_cuda(model)
    for batch, scale in ((2, 1), (1, 2)):
        inputs = spec.example(batch, scale)
        feed = {key: x.numpy() for key, x in zip(spec.inputs, inputs, strict=True)}
        (ours,) = ReferenceEvaluator(ir.to_proto(model), new_ops=CONTRIB_OPS).run(None, feed)
        with torch.no_grad():
            np.testing.assert_allclose(ours, spec.module(*inputs), atol=1e-4)


def test_external_weights_stay_when_their_graph_is_rewritten(
    specs: dict[str, GraphSpec], lowered: Lowered, tmp_path: Path
) -> None:
    spec = specs["vae_decoder"]
    file = write_graph(lowered("cuda", spec.name).clone(), tmp_path / "graph", {}, largest_single_file=0)
    weights = file.with_name("model.onnx_data")
    before = weights.read_bytes()
    assert rewrite_graph(file.parent, rewrite_for_cuda) and weights.read_bytes() == before
    inputs = spec.example(2, 1)
    (ours,) = ReferenceEvaluator(onnx.load(file), new_ops=CONTRIB_OPS).run(None, {"latent_sample": inputs[0].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(ours, spec.module(*inputs), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["portable", "cuda", "tensorrt", "web"])
def test_bundle_of_a_target(target: str, random_checkpoint: Path, tmp_path: Path) -> None:
    """From the command line to an image on the CPU. Without a GPU, the error names the package to install."""
    result = CliRunner().invoke(main, [str(random_checkpoint), "-o", str(tmp_path / "out"), "--target", target])
    assert result.exit_code == 0, result.output
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["target"] == target
    operators = {}
    for name in manifest["graphs"]:
        model = onnx.load(tmp_path / "out" / name / "model.onnx")
        assert {node.domain for node in model.graph.node} <= set(TARGETS[target].domains)
        operators[name] = {node.op_type for node in model.graph.node}
    if target == "cuda":
        assert manifest["devices"] == ["cuda"]
        assert {"GroupNorm", "MultiHeadAttention"} < operators["unet"]
        assert "GroupNormalization" not in operators["unet"]
        last = {name for name, entry in manifest["graphs"].items() if entry.get("channels_last")}
        assert last == {"unet", "vae_decoder", "vae_encoder", "image_encoder"}  # all graphs with images
        with pytest.raises(BundleError, match="exported for cuda, which runs on cuda; for device 'cpu' export another"):
            Bundle.open(tmp_path / "out")
    else:
        assert len(Generator(Bundle.open(tmp_path / "out", threads=1)).generate("a red dress", steps=2)) == 1
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert "cuda" not in manifest["parity"]
        with pytest.raises(ProviderError, match=r"device 'cuda' is not available .*pip install 'unidiff-sdk\[gpu\]'"):
            Bundle.open(tmp_path / "out", device="cuda").session("unet")


def test_targets_are_consistent() -> None:
    for name, target in TARGETS.items():
        assert set(target.precisions) <= set(PRECISIONS)
        assert set(target.devices) <= set(DEVICES) and "cpu" in target.devices  # every export is verified on the CPU
        assert target.attention[0] in target.domains
        check_options(target.precisions[0], name)


def test_precision_that_a_target_does_not_support_is_refused() -> None:
    with pytest.raises(OptionError, match="target tensorrt does not support int8; use one of fp32, fp16"):
        check_options("int8", "tensorrt")
