"""Low-rank factors as optional inputs of a graph, so that LoRAs can be switched at run time (Hu et al. 2021).

    y = W x + B A x         inputs LAYER.lora_A and LAYER.lora_B, with the rank as a free axis

Each input has a default of zeros, so that a call without factors computes the layer as it is. The names and the roles
are those that `onnxruntime.LoraAdapter` expects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from unidiff_export.quantization.qdq import layer_of
from unidiff_sdk.errors import ExportError

__all__ = ["Factors", "add_adapter_inputs", "input_values"]

PRODUCTS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True)
class Factors:
    """A change B A of the weight of a linear layer or a convolution.

    Attributes:
        down: A, float[rank, in] or float[rank, in, kernel, kernel].
        up: B with all scales, float[out, rank] or float[out, rank, 1, 1].
    """

    down: Tensor
    up: Tensor


def input_values(layer: str, factors: Factors) -> dict[str, np.ndarray]:
    """The inputs of a graph for the factors of a layer: float32[in, rank] and [rank, out], or kernels as they are."""
    down, up = factors.down, factors.up
    if down.ndim == 2:
        down, up = down.T, up.T
    arrays = {"lora_A": down, "lora_B": up}
    return {f"{layer}.{name}": np.ascontiguousarray(array.numpy(), np.float32) for name, array in arrays.items()}


def add_adapter_inputs(model: ir.Model, layers: Mapping[str, nn.Module], graph_name: str) -> None:
    """Add the optional inputs of layers to a graph whose nodes are named by their layers, in place.

    Raises:
        ExportError: a layer is not one product of the graph.
    """
    for layer, module in layers.items():
        nodes = [node for node in model.graph if node.op_type in PRODUCTS and layer_of(node) == layer]
        if len(nodes) != 1:
            raise ExportError(
                f"{layer} of {graph_name} is computed by {len(nodes)} products, so its LoRA cannot be switched. Merge "
                "it: leave out --lora-switchable."
            )
        _add_branch(model.graph, nodes[0], layer, module)


def _add_branch(graph: ir.Graph, node: ir.Node, layer: str, module: Any) -> None:
    """Add B A x to the result of a product W x."""
    result, x = node.outputs[0], node.inputs[0]
    assert x is not None and result.dtype is not None  # a product has operands, and the exporter types every value
    out_size, in_size, *kernel = module.weight.shape
    shapes: tuple[list[Any], list[Any]] = ([in_size, "rank"], ["rank", out_size])
    if node.op_type == "Conv":
        shapes = ["rank", in_size, *kernel], [out_size, "rank", 1, 1]
    down, up = (
        _optional_input(graph, f"{layer}.{name}", shape)
        for name, shape in zip(("lora_A", "lora_B"), shapes, strict=True)
    )
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], attributes: dict[str, Any] | None = None) -> ir.Value:
        made = ir.node(op_type, inputs, attributes, name=f"{layer}.lora/{op_type}_{len(nodes)}")
        made.outputs[0].name = f"{layer}.lora.{len(nodes)}"
        nodes.append(made)
        return made.outputs[0]

    if result.dtype != ir.DataType.FLOAT:
        down, up = (add("Cast", [value], {"to": int(result.dtype)}) for value in (down, up))
    if node.op_type == "Conv":
        change = ir.node("Conv", [x, down], name=f"{layer}.lora/Conv_down")
        for attribute in node.attributes.values():
            if attribute.name != "kernel_shape":
                change.attributes.add(attribute)
        change.outputs[0].name = f"{layer}.lora.down"
        nodes.append(change)
        delta = add("Conv", [change.outputs[0], up])
    else:
        delta = add("MatMul", [add("MatMul", [x, down]), up])
    base = ir.Value(name=f"{layer}.base", type=result.type, shape=result.shape)
    total = add("Add", [base, delta])
    total.type, total.shape = result.type, result.shape
    graph.insert_after(node, nodes)
    ir.convenience.replace_all_uses_with(result, total, replace_graph_outputs=True)
    nodes[-1].replace_input_with(0, result)
    name, result.name = result.name, base.name
    total.name = name


def _optional_input(graph: ir.Graph, name: str, shape: list[Any]) -> ir.Value:
    """An input with a default of zeros: those of rank 1."""
    zeros = np.zeros([1 if size == "rank" else size for size in shape], np.float32)
    tensor = ir.tensor(zeros, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor)
    graph.inputs.append(value)
    graph.initializers.add(value)
    return value
