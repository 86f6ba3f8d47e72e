"""Rewritings of float graphs into what ONNX Runtime's CPU kernels run faster; each is here because it was measured.

They find operators, not patterns of an exporter's making, and leave alone what is not exactly as they expect.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def rewrite_for_cpu(model: ir.Model) -> None:
    """All of them, in place."""
    for node in list(model.graph):
        if node.op_type == "GroupNormalization":
            expand_group_norm(model.graph, node)
        elif node.op_type == "Split":
            split_weights(model.graph, node)


def expand_group_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """GroupNormalization as InstanceNormalization over its groups, then scale and bias of the channels.

    ONNX Runtime has no kernel for the former and runs its definition, some twenty nodes of which nine go over the whole
    tensor: between 2 and 20 times slower.
    """
    x, scale, bias = norm.inputs
    assert x is not None and scale is not None and bias is not None
    if scale.shape is None or not isinstance(channels := scale.shape[0], int) or scale.dtype is None or x.shape is None:
        return
    groups, result = norm.attributes.get_int("num_groups"), norm.outputs[0]
    name, dtype = norm.name, scale.dtype.numpy()
    ones = constant(graph, f"ones.{groups}.{scale.dtype.name}", np.ones(groups, dtype))
    zeros = constant(graph, f"zeros.{groups}.{scale.dtype.name}", np.zeros(groups, dtype))
    over_groups = constant(graph, f"over_groups.{groups}", np.array([0, groups, -1], np.int64))
    column = constant(graph, f"column.{channels}.{len(x.shape)}", np.array([channels] + [1] * (len(x.shape) - 2)))

    nodes: list[ir.Node] = []

    def add(op_type: str, *inputs: ir.Value, like: ir.Value | None = None, **attributes: float) -> ir.Value:
        made = ir.node(op_type, list(inputs), attributes, name=f"{name}.{op_type}.{len(nodes)}")
        made.outputs[0].name = f"{result.name}.{len(nodes)}"
        if like is not None:
            made.outputs[0].type, made.outputs[0].shape = like.type, like.shape
        nodes.append(made)
        return made.outputs[0]

    flat = add("Reshape", x, over_groups)
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    normal = add("InstanceNormalization", flat, ones, zeros, epsilon=epsilon)
    normal = add("Reshape", normal, add("Shape", x), like=result)
    scaled = add("Mul", normal, add("Reshape", scale, column), like=result)
    last = add("Add", scaled, add("Reshape", bias, column), like=result)
    replace(graph, norm, nodes, last)


def split_weights(graph: ir.Graph, split: ir.Node) -> None:
    """A matrix product and bias whose result is then cut in equal parts (GEGLU) as one product for each part.

    Cutting copies the largest tensor of a transformer block; cutting the weights costs nothing.
    """
    source, count = split.inputs[0], len(split.outputs)
    add = source.producer() if source is not None else None
    product = add.inputs[0].producer() if add is not None and add.op_type == "Add" and add.inputs[0] else None
    if add is None or product is None or product.op_type != "MatMul" or len(split.inputs) > 1:
        return
    weight, bias = product.inputs[1], add.inputs[1]
    if any(v is None or v.const_value is None or not v.is_initializer() for v in (weight, bias)):
        return
    assert weight is not None and bias is not None and weight.const_value is not None and bias.const_value is not None
    width = bias.const_value.size
    axis, rank = split.attributes.get_int("axis", 0), len(source.shape) if source is not None and source.shape else 0
    alone = len(source.uses()) == len(product.outputs[0].uses()) == 1 if source is not None else False
    if not alone or axis not in (-1, rank - 1) or width % count or len(bias.const_value.shape) != 1:
        return
    weights = np.split(weight.const_value.numpy(), count, axis=-1)
    biases = np.split(bias.const_value.numpy(), count)
    for part, output in enumerate(split.outputs):
        cut = constant(graph, f"{weight.name}.{part}", weights[part])
        shift = constant(graph, f"{bias.name}.{part}", biases[part])
        multiplied = ir.node("MatMul", [product.inputs[0], cut], name=f"{product.name}.{part}")
        multiplied.outputs[0].name = f"{output.name}.product"
        multiplied.outputs[0].type, multiplied.outputs[0].shape = output.type, output.shape
        shifted = ir.node("Add", [multiplied.outputs[0], shift], name=f"{add.name}.{part}")
        shifted.outputs[0].type, shifted.outputs[0].shape = output.type, output.shape
        graph.insert_before(split, [multiplied, shifted])
        ir.convenience.replace_all_uses_with(output, shifted.outputs[0], replace_graph_outputs=True)
        shifted.outputs[0].name, output.name = output.name, f"{output.name}.split"
    graph.remove([split, add, product], safe=True)
    for value in (weight, bias):
        if not value.uses():
            graph.initializers.pop(str(value.name))


def constant(graph: ir.Graph, name: str, value: np.ndarray | np.generic) -> ir.Value:
    """The initialiser `name` of the graph, made of `value` if it is not there yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(value).reshape(np.shape(value)), name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(value)), const_value=tensor)
    graph.initializers.add(made)
    return made


def replace(graph: ir.Graph, node: ir.Node, by: list[ir.Node], last: ir.Value) -> None:
    """Put the nodes `by`, whose result is `last`, in the place of `node`; the result keeps its name."""
    result = node.outputs[0]
    last.type, last.shape = result.type, result.shape
    graph.insert_before(node, by)
    ir.convenience.replace_all_uses_with(result, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.name = result.name  # which may be that of one of the graph's results
