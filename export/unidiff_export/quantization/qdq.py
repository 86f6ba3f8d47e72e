"""Static int8 in an ONNX graph: each quantized layer stands between QuantizeLinear and DequantizeLinear (QDQ).

Activations are uint8 with a zero point and one scale per tensor. Weights are int8 without a zero point and with one
scale per output channel. Biases are int32 with the product of both scales (Jacob et al. 2018, arXiv:1712.05877). ONNX
Runtime fuses such a layer into one integer kernel. int8 weights take a quarter of the space of float32.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from unidiff_export.graphs.passes import constant, replace
from unidiff_export.options import CONTRIB

# Where torch's exporter records the modules behind a node, outermost first, then the operation.
SCOPES = "pkg.torch.onnx.name_scopes"
INT8_MAX, UINT8_MAX = 127, 255
# The axis of the output channels in a weight.
CHANNEL_AXIS = {"Conv": 0, "MatMul": 1}
OPERATORS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Range:
    """The range of a tensor's values. It always contains zero, which needs an exact code, as padding is zero."""

    low: float
    high: float

    @classmethod
    def of(cls, low: float, high: float) -> Range:
        """Return the smallest range that contains `low`, `high` and zero."""
        return cls(min(low, 0.0), max(high, 0.0))

    def __or__(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high))

    @property
    def scale(self) -> np.float32:
        """The value of one step of the codes."""
        return np.float32(max(self.high - self.low, float(np.finfo(np.float32).tiny) * UINT8_MAX) / UINT8_MAX)

    @property
    def zero_point(self) -> np.uint8:
        """The code of zero."""
        return np.uint8(np.clip(np.rint(-self.low / self.scale), 0, UINT8_MAX))


@dataclass(frozen=True)
class LayerRanges:
    """The ranges of one layer's input and output in calibration."""

    input: Range
    output: Range


def quantize_weights(weights: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return int8 codes in [-127, 127] and a scale for each slice along `axis`, with codes · scale ≈ weights."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    peak = np.maximum(weights.max(axis=others), -weights.min(axis=others))
    scales = np.where(peak > 0, peak / INT8_MAX, 1).astype(np.float32)
    shape = [1] * weights.ndim
    shape[axis] = -1
    codes = np.rint(weights / scales.reshape(shape)).clip(-INT8_MAX, INT8_MAX)
    return codes.astype(np.int8), scales


def name_by_layer(model: ir.Model) -> None:
    """Name each node "layer/result", after the PyTorch module that the exporter recorded for it."""
    for node in model.graph:
        if scopes := node.metadata_props.get(SCOPES):
            *_, layer, _ = ast.literal_eval(scopes)
            node.name = f"{layer}/{node.outputs[0].name}"  # names of values are unique


def layer_of(node: ir.Node) -> str:
    """Return the PyTorch module behind a node, as `name_by_layer` recorded it, or ""."""
    return (node.name or "").rpartition("/")[0]


def quantizable(model: ir.Model) -> list[tuple[str, ir.Node]]:
    """Return the nodes that multiply by a constant matrix or kernel, with their PyTorch layers.

    A layer has several nodes if a pass has split its weights.
    """
    return [
        (layer_of(node), node)
        for node in model.graph
        if node.op_type in OPERATORS and layer_of(node) and _weight(node) is not None
    ]


def quantize(model: ir.Model, ranges: Mapping[str, LayerRanges], *, contrib: bool = False) -> list[str]:
    """Quantize the layers of `model` that `ranges` names, in place, and return the names of the quantized layers.

    Layers that read the same tensor share one QuantizeLinear and one DequantizeLinear over the union of their ranges.
    A convolution that computes an output of the graph stays float, because an integer kernel would round it to 256
    values.

    Args:
        model: the graph in float.
        ranges: the layers to quantize, with their ranges.
        contrib: use ONNX Runtime's own operator for a matrix product with a bias, which adds the bias in its kernel.
    """
    for name, node in quantizable(model):
        if name in ranges and node.op_type == "Gemm":
            _split_gemm(model.graph, node)
    selected = [
        (name, node)
        for name, node in quantizable(model)
        if name in ranges and not (node.op_type == "Conv" and node.outputs[0].is_graph_output())
    ]
    layers = [(node, _input(node), ranges[name]) for name, node in selected]
    spans: dict[ir.Value, Range] = {}
    for node, source, layer in layers:
        spans[source] = spans.get(source, Range(0, 0)) | layer.input
        if node.op_type == "Conv":
            # An integer convolution returns codes. A matrix product can return floats, which is more precise.
            spans[node.outputs[0]] = spans.get(node.outputs[0], Range(0, 0)) | layer.output
    convolved = {node.outputs[0]: list(node.outputs[0].uses()) for node, _, _ in layers if node.op_type == "Conv"}
    coded = {tensor: _Codes(model.graph, tensor, span) for tensor, span in spans.items()}
    for tensor, users in convolved.items():
        for user, index in users:
            user.replace_input_with(index, coded[tensor].decoded)
    for node, source, _ in layers:
        add = _bias_of(node) if contrib else None
        if add is None:
            _quantize_layer(model.graph, node, coded[source])
        else:
            _quantize_product(model, node, add, coded[source])
    for codes in coded.values():
        if not codes.decoded.uses():  # ONNX Runtime would compute it anyway
            model.graph.remove(codes.decode, safe=True)
    return list(dict.fromkeys(name for name, _ in selected))


class _Codes:
    """The nodes that quantize a tensor and dequantize it again, shared by all layers that read it."""

    def __init__(self, graph: ir.Graph, source: ir.Value, span: Range) -> None:
        self.span = span
        self.scale = constant(graph, f"{source.name}.scale", span.scale)
        self.zero_point = constant(graph, f"{source.name}.zero_point", span.zero_point)
        encode = _node("QuantizeLinear", [source, self.scale, self.zero_point], f"{source.name}.codes")
        decode = _node("DequantizeLinear", [encode.outputs[0], self.scale, self.zero_point], f"{source.name}.decoded")
        encode.outputs[0].type, encode.outputs[0].shape = ir.TensorType(ir.DataType.UINT8), source.shape
        decode.outputs[0].type, decode.outputs[0].shape = source.type, source.shape
        self.encoded, self.decode, self.decoded = encode.outputs[0], decode, decode.outputs[0]
        producer = source.producer()
        if producer is None:
            graph.insert_before(graph[0], [encode, decode])
        else:
            graph.insert_after(producer, [encode, decode])


def _split_gemm(graph: ir.Graph, gemm: ir.Node) -> None:
    """Replace x·Wᵀ + b by MatMul and Add in three dimensions.

    ONNX Runtime has no integer kernel for a Gemm with float output.
    It fuses MatMul and Add in two dimensions to such a Gemm.
    """
    x, weight, *bias = gemm.inputs
    assert x is not None and weight is not None and weight.const_value is not None
    matrix = weight.const_value.numpy()
    if gemm.attributes.get_int("transB", 0):
        matrix = matrix.T
    result = gemm.outputs[0]
    front = constant(graph, "front_axis", np.array([0], np.int64))
    raised = _node("Unsqueeze", [x, front], f"{result.name}.raised")
    raised.outputs[0].type = x.type
    weights = constant(graph, f"{weight.name}.matrix", matrix)
    product = _node("MatMul", [raised.outputs[0], weights], f"{result.name}.product")
    nodes = [raised, product]
    if bias and bias[0] is not None:
        nodes.append(_node("Add", [product.outputs[0], bias[0]], f"{result.name}.sum"))
    nodes.append(_node("Squeeze", [nodes[-1].outputs[0], front], f"{result.name}.lowered"))
    product.name = gemm.name
    product.outputs[0].type = result.type
    replace(graph, gemm, nodes, nodes[-1].outputs[0])
    if not weight.uses():
        graph.initializers.pop(str(weight.name))


def _quantize_layer(graph: ir.Graph, node: ir.Node, source: _Codes) -> None:
    weight = _weight(node)
    assert weight is not None and weight.const_value is not None
    axis = CHANNEL_AXIS[node.op_type]
    codes, scales = quantize_weights(weight.const_value.numpy(), axis)
    scale = constant(graph, f"{weight.name}.scale", scales)
    node.replace_input_with(0, source.decoded)
    node.replace_input_with(1, _decoded(graph, node, f"{weight.name}.int8", codes, scale, axis, weight))
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and bias.const_value is not None:
        bias_scales = scales * source.span.scale
        limits = np.iinfo(np.int32)
        bias_codes = np.rint(bias.const_value.numpy().astype(np.float64) / bias_scales).clip(limits.min, limits.max)
        bias_scale = constant(graph, f"{bias.name}.scale", bias_scales)
        decoded = _decoded(graph, node, f"{bias.name}.int32", bias_codes.astype(np.int32), bias_scale, 0, bias)
        node.replace_input_with(2, decoded)
    for replaced in (weight, bias):
        if replaced is not None and not replaced.uses() and replaced.name in graph.initializers:
            graph.initializers.pop(str(replaced.name))


def _bias_of(product: ir.Node) -> ir.Node | None:
    """Return the Add of a constant vector that is the only user of a matrix product, or None."""
    users = list(product.outputs[0].uses())
    if product.op_type != "MatMul" or len(users) != 1 or users[0].node.op_type != "Add":
        return None
    bias = users[0].node.inputs[1 - users[0].idx]
    vector = bias is not None and bias.is_initializer() and bias.const_value is not None and len(bias.const_value.shape)
    return users[0].node if vector == 1 else None


def _quantize_product(model: ir.Model, product: ir.Node, add: ir.Node, source: _Codes) -> None:
    """Replace MatMul and Add by MatMulIntegerToFloat. ONNX Runtime itself fuses only the MatMul."""
    graph, weight = model.graph, _weight(product)
    assert weight is not None and weight.const_value is not None
    codes, scales = quantize_weights(weight.const_value.numpy(), CHANNEL_AXIS["MatMul"])
    bias = next(value for value in add.inputs if value is not product.outputs[0])
    stored = constant(graph, f"{weight.name}.int8", codes)
    scale = constant(graph, f"{weight.name}.scale", scales)
    inputs = [source.encoded, stored, source.scale, scale, source.zero_point, None, bias]
    fused = ir.Node(CONTRIB, "MatMulIntegerToFloat", inputs, name=product.name)
    fused.outputs[0].name = f"{add.outputs[0].name}.fused"
    model.opset_imports[CONTRIB] = 1
    replace(graph, add, [fused], fused.outputs[0])
    graph.remove(product, safe=True)
    if not weight.uses():
        graph.initializers.pop(str(weight.name))


def _decoded(
    graph: ir.Graph, before: ir.Node, name: str, codes: NDArray, scale: ir.Value, axis: int, like: ir.Value
) -> ir.Value:
    """Store a constant as `codes`, and return the output of a DequantizeLinear that restores it."""
    stored = constant(graph, name, codes)
    node = _node("DequantizeLinear", [stored, scale], f"{name}.decoded", {"axis": axis})
    node.outputs[0].type, node.outputs[0].shape = like.type, like.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None  # every one of these operators has a first input
    return value


def _weight(node: ir.Node) -> ir.Value | None:
    """Return the constant that a layer multiplies by, or None."""
    weight = node.inputs[1]
    return weight if weight is not None and weight.const_value is not None and weight.is_initializer() else None


def _node(op_type: str, inputs: list[ir.Value], output: str, attributes: Mapping[str, int] | None = None) -> ir.Node:
    attrs = [ir.AttrInt64(name, value) for name, value in (attributes or {}).items()]
    node = ir.Node("", op_type, inputs, attrs, name=output)
    node.outputs[0].name = output
    return node
