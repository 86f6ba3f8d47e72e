"""int8: codes follow the formula, ONNX Runtime runs integer kernels, and verification keeps sensitive layers float."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import onnx_ir as ir
import onnxruntime
import torch
from support.batching import batch_differences
from torch import Tensor, nn

from unidiff_export import Export, export_bundle
from unidiff_export.graphs.lowering import GraphSpec, graph_specs, lower
from unidiff_export.quantization.calibration import Calibration, layer_errors, multiply_adds, observing
from unidiff_export.quantization.policy import Int8Policy
from unidiff_export.quantization.qdq import LayerRanges, Range, quantizable, quantize, quantize_weights
from unidiff_export.reference import Samples, read_samples
from unidiff_export.verification import TOLERANCES
from unidiff_sdk.errors import ExportError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.engines.onnx_runtime import avoid_saturation
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

# The results of an untrained model are sensitive, and differ between processors.
UNTRAINED = replace(TOLERANCES["int8"], cosine=0.9)
FINITE = st.floats(-1e4, 1e4, width=32)


class Block(nn.Module):
    """One layer of each kind, two of them on the same tensor, and a convolution that feeds another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.query, self.key = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.embed = nn.Linear(4, 8)

    def forward(self, image: Tensor, time: Tensor) -> Tensor:
        x = self.second(self.first(image)) + self.embed(time)[:, :, None, None]
        x = x.flatten(2).transpose(1, 2)
        return nn.functional.silu(self.query(x)) * self.key(x)


@pytest.fixture(scope="module")
def block() -> GraphSpec:
    torch.manual_seed(0)
    return GraphSpec(
        "block",
        Block().eval(),
        0,
        {"image": {0: "batch"}, "time": {0: "batch"}},
        ("y",),
        lambda batch, scale: (torch.randn(batch, 4, 8, 8), torch.randn(batch, 4)),
    )


@pytest.fixture(scope="module")
def calls(block: GraphSpec) -> tuple[tuple[Tensor, ...], ...]:
    torch.manual_seed(1)
    return tuple(block.example(3, 1) for _ in range(4))


@pytest.fixture(scope="module")
def ranges(block: GraphSpec, calls: Any) -> dict[str, LayerRanges]:
    """The ranges by definition: minimum and maximum over all values of each layer."""
    values: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def observe(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        xs, ys = values.setdefault(name, ([], []))
        xs.append(x.flatten())
        ys.append(y.flatten())

    with observing(block, observe), torch.no_grad():
        for inputs in calls:
            block.module(*inputs)
    return {
        name: LayerRanges(*(Range.of(float(torch.cat(z).min()), float(torch.cat(z).max())) for z in xy))
        for name, xy in values.items()
    }


@pytest.fixture(scope="module")
def lowered(block: GraphSpec) -> ir.Model:
    return lower(block)


def session(model: ir.Model, file: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    ir.save(model, file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    avoid_saturation(options)
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


@given(low=FINITE, high=FINITE, inside=st.floats(0, 1))
def test_range_codes_are_within_half_a_step(low: float, high: float, inside: float) -> None:
    span = Range.of(min(low, high), max(low, high))
    scale, zero = float(span.scale), int(span.zero_point)
    assert span.low <= 0 <= span.high and 0 <= zero <= 255
    value = span.low + inside * (span.high - span.low)
    code = np.clip(np.rint(value / scale) + zero, 0, 255)
    assert (
        abs((code - zero) * scale - value) <= scale * 1.001
    )  # half a step, plus half a step for the rounded zero point


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
def test_weight_codes_are_within_half_a_step(seed: int, axis: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((5, 7)).astype(np.float32)
    weights[:, 3] = weights[2] = 0
    codes, scales = quantize_weights(weights, axis)
    steps = scales[:, None] if axis == 0 else scales[None]
    assert codes.dtype == np.int8 and codes.min() >= -127
    assert np.all(np.abs(codes * steps - weights) <= steps / 2 * 1.001)
    assert np.all(np.abs(codes).max(axis=1 - axis)[scales != 1] == 127)


def test_quantizable_layers_are_found_by_their_modules(lowered: ir.Model) -> None:
    found = {name: node.op_type for name, node in quantizable(lowered)}
    assert found == {"first": "Conv", "second": "Conv", "query": "MatMul", "key": "MatMul", "embed": "Gemm"}


@pytest.mark.parametrize("contrib", [False, True])
def test_quantized_graph_is_accurate_and_runs_integer_kernels(
    lowered: ir.Model, block: GraphSpec, calls: Any, ranges: dict[str, LayerRanges], tmp_path: Path, contrib: bool
) -> None:
    model = lowered.clone()
    quantize(model, ranges, contrib=contrib)
    assert [node.op_type for node in model.graph if node.domain] == ["MatMulIntegerToFloat"] * (2 if contrib else 0)
    floats = {name for name, value in model.graph.initializers.items() if value.dtype == ir.DataType.FLOAT}
    assert not any(name.endswith(("weight", "matrix")) for name in floats)
    graph = session(model, tmp_path / "int8.onnx", tmp_path / "optimized.onnx")
    for inputs in calls:
        ours = graph.run(None, {"image": inputs[0].numpy(), "time": inputs[1].numpy()})[0]
        with torch.no_grad():
            expected = block.module(*inputs).numpy()
        error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
        assert 0 < error < 0.05
    # ONNX Runtime runs all five layers as integer kernels.
    kernels = [node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert kernels.count("QLinearConv") == 2
    assert kernels.count("MatMulIntegerToFloat") == 3
    assert not {"Conv", "MatMul", "Gemm"} & set(kernels)
    assert kernels.count("Add") == (1 if contrib else 3)  # one of the block, and two biases without contrib
    assert kernels.count("DequantizeLinear") == 1  # of the second convolution, before the block's Add


def test_layers_that_read_one_tensor_share_its_codes(lowered: ir.Model, ranges: dict[str, LayerRanges]) -> None:
    model = lowered.clone()
    quantize(model, {name: ranges[name] for name in ("query", "key")})
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 1
    assert sum(node.op_type == "Conv" for node in model.graph) == 2


def test_convolution_with_a_graph_output_stays_float(calls: Any, ranges: dict[str, LayerRanges]) -> None:
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3))
    spec = GraphSpec("last", module, 0, {"input": {0: "batch"}}, ("y",), lambda b, s: (calls[0][0][:b],))
    model = lower(spec)
    assert quantize(model, {"0": ranges["first"], "1": ranges["second"]}) == ["0"]
    (y,) = model.graph.outputs
    weight = y.producer().inputs[1]
    assert y.producer().op_type == "Conv" and weight.is_initializer() and weight.dtype == ir.DataType.FLOAT


def test_outputs_keep_their_names(tmp_path: Path) -> None:
    """Even if quantization replaces the last node, as in a projection of CLIP."""
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    module = nn.Linear(4, 8)
    spec = GraphSpec(
        "projection", nn.Sequential(module), 0, {"input": {0: "batch"}}, ("embeds",), lambda b, s: (x[:b],)
    )
    model = lower(spec)
    assert dict(quantizable(model))["0"].op_type == "Gemm"
    quantize(model, {"0": LayerRanges(Range.of(float(x.min()), float(x.max())), Range(-9, 9))})
    ours = session(model, tmp_path / "int8.onnx").run(["embeds"], {"input": x.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(ours, module(x).numpy(), atol=0.05)


def test_layer_errors_agree_with_onnx_runtime(
    lowered: ir.Model, block: GraphSpec, calls: Any, ranges: dict[str, LayerRanges], tmp_path: Path
) -> None:
    """Compared on the first convolution, whose output can be read."""
    module = nn.Sequential(block.module.first, nn.Flatten())  # a convolution with a graph output would stay float
    first = GraphSpec("first", module, 0, {"input": {0: "batch"}}, ("y",), lambda b, s: (calls[0][0][:b],))
    model = lower(first)
    span = ranges["first"]
    quantize(model, {"0": span})
    x = calls[0][0]
    ours = session(model, tmp_path / "first.onnx").run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        y = module(x).numpy()
    expected = float(((ours - y) ** 2).sum() / (y**2).sum())
    assert layer_errors(block, calls[:1], ranges)["first"] == pytest.approx(expected, rel=0.05)


def test_multiply_adds_of_layers(block: GraphSpec) -> None:
    layers, total = multiply_adds(block, block.example(1, 1))
    assert layers == {"first": 64 * 8 * 4 * 9, "second": 16 * 8 * 8 * 9, "query": 16 * 64, "key": 16 * 64, "embed": 32}
    assert total == sum(layers.values())


def test_multiply_adds_include_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    spec = GraphSpec("attention", Attention(), 0, {"x": {}}, ("y",), lambda b, s: (torch.randn(b, 2, 16, 8),))
    assert multiply_adds(spec, spec.example(1, 1)) == ({}, 2 * 2 * 16 * 16 * 8)


def test_policy_keeps_the_most_sensitive_layers_float(
    block: GraphSpec, calls: Any, ranges: dict[str, LayerRanges]
) -> None:
    wide = dict(ranges)
    wide["key"] = LayerRanges(Range(-1e4, 1e4), ranges["key"].output)  # so wide that the codes represent nothing
    policy = Int8Policy([block], Calibration({"block": wide}, {"block": calls}))
    assert policy.float_layers("block") == [] and policy.ranges("block").keys() == ranges.keys()
    assert policy.describe("block", list(ranges))["multiply_adds"] == 1
    float_layers = []
    while policy.keep_more_float(["block", "unknown"]):
        float_layers.append(policy.float_layers("block"))
    assert [len(names) for names in float_layers] == [1, 2, 4, 5]
    assert float_layers[0] == ["key"]
    assert all(before == after[: len(before)] for before, after in pairwise(float_layers))
    assert policy.describe("block", []) == {"layers": 0, "multiply_adds": 0, "float_layers": float_layers[-1]}


def test_samples_are_split_without_overlap(random_checkpoint: Path, small_catalog: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    samples = read_samples(checkpoint, small_catalog, 200)
    assert len(samples.captions) == 11  # two of twelve have the same meaning
    verification, calibration = samples.split(4)
    assert len(calibration.captions) == 4
    assert set(verification.captions) | set(calibration.captions) == set(samples.captions)
    assert verification.images is not None and len(verification.images) == 7
    for caption, image in zip(samples.captions, samples.images or (), strict=True):
        row = next(r for r in map(json.loads, (small_catalog / "metadata.jsonl").open()) if r["text"] == caption)
        from PIL import ImageColor

        assert tuple(image[16, 16]) == ImageColor.getrgb(row["colour"])
    assert Samples(("one",)).split(16) == (Samples(("one",)), Samples(()))


@pytest.fixture(scope="module")
def int8(random_checkpoint: Path, small_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return export_bundle(random_checkpoint, folder, precision="int8", calibration=small_catalog, tolerance=UNTRAINED)


@pytest.mark.slow
def test_int8_bundle_runs_and_describes_its_layers(int8: Export, random_checkpoint: Path) -> None:
    bundle = Bundle.open(int8.path, threads=1)
    assert bundle.precision == "int8"
    specs = {spec.name: spec for spec in graph_specs(load_checkpoint(random_checkpoint))}
    for name, graph in bundle.manifest.graphs.items():
        assert graph.precision == "int8" and graph.int8["layers"] > len(graph.int8["float_layers"])
        assert graph.int8["multiply_adds"] > 0.7
        weights = sum(p.numel() for p in specs[name].module.parameters())
        assert graph.bytes < 4 * weights or name.startswith("vae")  # its module holds both the encoder and the decoder
    assert int8.image.psnr_db >= 25 and int8.search.pairs == 6
    (image,) = Generator(bundle).generate("a red dress", seed=3, steps=3)
    assert np.asarray(image).std() > 0


@pytest.mark.slow
def test_int8_images_are_bit_equal_when_generated_alone(int8: Export) -> None:
    """In a batch with others, a value between two codes may be rounded to the other one."""
    _, own = batch_differences(Bundle.open(int8.path, threads=1))
    assert own == 0


@pytest.mark.slow
def test_verification_keeps_layers_float_until_it_passes(
    int8: Export, random_checkpoint: Path, small_catalog: Path, tmp_path: Path
) -> None:
    stages: list[str] = []
    strict = int8.image.psnr_db + 4  # several times, one more layer is not enough
    export = export_bundle(
        random_checkpoint,
        tmp_path / "out",
        precision="int8",
        calibration=small_catalog,
        tolerance=replace(UNTRAINED, image_psnr_db=strict),
        progress=stages.append,
    )
    assert export.image.psnr_db >= strict
    counts = [int(stage.split()[2]) for stage in stages if stage.startswith("Quantizing unet, ")]
    assert len(counts) >= 2 and counts[0] == 1 and all(more == 2 * fewer for fewer, more in itertools.pairwise(counts))
    lowered = [stage for stage in stages if stage.startswith("Lowering")]
    assert len(lowered) == len(set(lowered)) == 5  # quantized again, but not lowered again
    opened = Bundle.open(export.path, threads=1)
    entry = opened.manifest.graphs["unet"].int8
    assert entry is not None and len(entry["float_layers"]) == counts[-1]
    graph = ir.load(opened.path / "unet" / "model.onnx").graph
    layers = [(node.name.rpartition("/")[0], node) for node in graph if node.op_type in ("Conv", "Gemm", "MatMul")]
    float_layers = [(name, node) for name, node in layers if name in entry["float_layers"]]
    assert {name for name, _ in float_layers} == set(entry["float_layers"])
    for _, node in float_layers:
        producer = node.inputs[1].producer()
        assert producer is None or producer.op_type != "DequantizeLinear"


def test_int8_without_captions_names_the_option(random_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    for captions in (["the only one"], []):
        checkpoint.meta["captions"] = captions
        with pytest.raises(ExportError, match=r"records fewer than 2 captions.*--calibration DATA"):
            export_bundle(checkpoint, tmp_path / "out", precision="int8")
    assert not list(tmp_path.iterdir())
