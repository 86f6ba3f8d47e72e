"""Passes over float graphs that replace operators by ones with faster kernels in ONNX Runtime. Each gain was measured.

Passes look for operators, not for patterns of a specific exporter, and leave nodes that do not match exactly.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from unidiff_export.options import CONTRIB, STANDARD

# From this number of keys on, blockwise attention is faster on a CPU.
MANY_KEYS = 1024
# The CUDA kernel of GroupNorm processes two channels per thread, and a whole group in one block.
LARGEST_GROUP = 256
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
ELEMENTWISE = {"Add", "Cast", "Div", "Mul", "Sigmoid", "Sub"}


def rewrite_for_cpu(model: ir.Model, typical_sizes: Mapping[str, int]) -> None:
    """Apply the passes for CPU kernels in place. `typical_sizes`: the most frequent sizes of dynamic axes."""
    for node in list(model.graph):
        if node.op_type == "GroupNormalization":
            expand_group_norm(model.graph, node)
        elif node.op_type == "Split":
            split_weights(model.graph, node)
        elif node.op_type == "Attention" and node.domain == STANDARD:
            use_blockwise_attention(model.graph, node, typical_sizes)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports.setdefault(CONTRIB, 1)


def expand_group_norm(graph: ir.Graph, norm: ir.Node) -> None:
    """Replace GroupNormalization by InstanceNormalization over its groups, followed by scale and bias.

    ONNX Runtime has no kernel for GroupNormalization and runs its definition: about twenty nodes, nine of them over the
    whole tensor, which is between 2 and 20 times slower.
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


def use_blockwise_attention(graph: ir.Graph, node: ir.Node, typical_sizes: Mapping[str, int]) -> None:
    """Replace Attention over many keys by com.microsoft::MultiHeadAttention, which computes it block by block.

    Attention holds all scores at once: 1 GiB for a batch of 2 at 64 x 64 latents. MultiHeadAttention reads and writes
    [batch, length, heads * width]; ONNX Runtime cancels the transpositions with those of the layers around it.
    """
    shapes = [value.shape for value in node.inputs if value is not None]
    causal = node.attributes.get_int("is_causal", 0)
    if len(node.inputs) != 3 or None in shapes or causal:
        return
    (_, heads, _, width), (_, _, keys, _) = (shape.evaluate(typical_sizes) for shape in shapes[:2] if shape is not None)
    if not isinstance(keys, int) or keys < MANY_KEYS or not isinstance(heads, int) or not isinstance(width, int):
        return
    name, result = node.name, node.outputs[0]
    joined = constant(graph, f"joined.{heads}.{width}", np.array([0, 0, heads * width], np.int64))
    apart = constant(graph, f"apart.{heads}.{width}", np.array([0, 0, heads, width], np.int64))
    nodes = []

    def add(operator: str, inputs: list, attributes: dict, label: str, domain: str = STANDARD) -> ir.Value:
        made = ir.node(operator, inputs, attributes, domain=domain, name=f"{name}.{label}")
        made.outputs[0].name, made.outputs[0].type = f"{result.name}.{label}", result.type
        nodes.append(made)
        return made.outputs[0]

    entries = []
    for label, value in zip(("query", "key", "value"), node.inputs, strict=True):
        heads_last = add("Transpose", [value], {"perm": [0, 2, 1, 3]}, f"{label}.turned")
        entries.append(add("Reshape", [heads_last, joined], {}, label))
    scale = node.attributes.get_float("scale", width**-0.5)
    states = add("MultiHeadAttention", entries, {"num_heads": heads, "scale": scale}, "blocks", CONTRIB)
    split = add("Reshape", [states, apart], {}, "split")
    replace(graph, node, nodes, add("Transpose", [split], {"perm": [0, 2, 1, 3]}, "states"))


def rewrite_for_cuda(model: ir.Model) -> bool:
    """Apply `ChannelsLast`, the pass for CUDA kernels, in place; return whether it changed anything."""
    layout = ChannelsLast(model.graph)
    for node in list(model.graph):
        layout.rewrite(node)
    if layout.changed:
        model.opset_imports.setdefault(CONTRIB, 1)
        RemoveUnusedNodesPass()(model)
    return layout.changed


class ChannelsLast:
    """Convert feature maps to [batch, height, width, channels], the layout of tensor cores, through the whole graph.

    Convolutions become com.microsoft::NhwcConv. Group norms, with a following SiLU, become com.microsoft::GroupNorm,
    because ONNX Runtime has no kernel for GroupNormalization on a GPU either. The operators between them are converted,
    too. ONNX Runtime can convert convolutions itself (`prefer_nhwc`), but then computes shapes on the GPU, which
    prevents the capture of CUDA graphs.

    Attributes:
        changed: whether any node was rewritten.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.changed = False
        self._graph = graph
        self._converted: dict[ir.Value, ir.Value] = {}  # values with channels first to the same with channels last

    def rewrite(self, node: ir.Node) -> None:
        """Rewrite `node` if the layout helps it. Its predecessors must have been rewritten."""
        if node.graph is None or node.domain != STANDARD:  # None: a SiLU that was fused into its group norm
            return
        if node.op_type == "Transpose":
            self._transpose(node)
        elif node.op_type == "Conv":
            self._convolution(node)
        elif node.op_type == "GroupNormalization":
            self._group_norm(node)
        elif any(value in self._converted for value in node.inputs):
            if node.op_type in ELEMENTWISE:
                self._elementwise(node)
            elif node.op_type == "Concat" and node.attributes["axis"].as_int() in (1, -3):
                self._replace(
                    node, "Concat", [self._channels_last(value, node) for value in node.inputs if value], {"axis": 3}
                )
            elif node.op_type == "Resize":
                self._resize(node)

    def _transpose(self, node: ir.Node) -> None:
        (value,), perm = node.inputs, tuple(node.attributes["perm"].as_ints())
        if value is not None and perm == TO_FIRST:
            self._converted[node.outputs[0]] = value
        elif value in self._converted and perm == TO_LAST and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(self._converted[value])

    def _convolution(self, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        if x is not None and weight is not None and weight.shape is not None and len(weight.shape) == 4:
            # ONNX Runtime transposes the weights when it loads them.
            inputs = [self._channels_last(x, node), self._channels_last(weight, node), *bias]
            self._replace(node, "NhwcConv", inputs, node.attributes, domain=CONTRIB)

    def _group_norm(self, node: ir.Node) -> None:
        x, scale, bias = node.inputs
        assert x is not None and scale is not None and bias is not None
        if x.shape is None or len(x.shape) != 4 or scale.const_value is None or bias.const_value is None:
            return
        groups = node.attributes.get_int("num_groups")
        width = scale.const_value.size // groups
        if width % 2 or width > LARGEST_GROUP:
            return
        # The kernel takes them in float32, whatever the type of x.
        gamma = constant(self._graph, f"{scale.name}.fp32", scale.const_value.numpy().astype(np.float32))
        beta = constant(self._graph, f"{bias.name}.fp32", bias.const_value.numpy().astype(np.float32))
        last, activation = node, _silu_after(node)
        if activation:
            last = activation[-1]
        settings = {
            "groups": groups,
            "epsilon": node.attributes.get_float("epsilon", 1e-5),
            "activation": int(bool(activation)),
            "channels_last": 1,
        }
        self._replace(last, "GroupNorm", [self._channels_last(x, node), gamma, beta], settings, domain=CONTRIB)
        if activation:
            self._graph.remove([activation[0], node], safe=True)
        for value in (scale, bias):
            if not value.uses():
                self._graph.initializers.pop(str(value.name), None)

    def _elementwise(self, node: ir.Node) -> None:
        """Rewrite an operator on feature maps and scalars."""
        shapes = [value.shape for value in node.inputs if value is not None]
        if any(shape is None or len(shape) not in (0, 4) for shape in shapes):
            return
        inputs = [
            self._channels_last(value, node) if value.shape else value for value in node.inputs if value is not None
        ]
        self._replace(node, node.op_type, inputs, node.attributes)

    def _resize(self, node: ir.Node) -> None:
        x, roi, scales, *sizes = [*node.inputs, None, None][:4]
        if any(sizes) or roi is not None or scales is None or scales.const_value is None or "axes" in node.attributes:
            return
        last_scales = constant(self._graph, f"{scales.name}.last", scales.const_value.numpy()[list(TO_LAST)])
        assert x is not None
        self._replace(node, "Resize", [self._channels_last(x, node), None, last_scales], node.attributes)

    def _channels_last(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Return `value` with channels last, transposed if necessary."""
        if value not in self._converted:
            transpose = ir.node("Transpose", [value], {"perm": TO_LAST}, name=f"{value.name}.turn")
            self._graph.insert_before(before, [transpose])
            self._converted[value] = _named(transpose, f"{value.name}.last", value)
        return self._converted[value]

    def _replace(self, node: ir.Node, operator: str, inputs: list, attributes: Mapping, domain: str = STANDARD) -> None:
        """Replace `node` by an operator with channels last and a transposition back."""
        result = node.outputs[0]
        made = ir.node(operator, inputs, attributes, domain=domain, name=node.name)
        last = _named(made, f"{result.name}.last", result)
        back = ir.node("Transpose", [last], {"perm": TO_FIRST}, name=f"{node.name}.back")
        replace(self._graph, node, [made, back], back.outputs[0])
        self._converted[back.outputs[0]] = last
        self.changed = True


def _named(node: ir.Node, name: str, first: ir.Value) -> ir.Value:
    """Name the result of `node`, which is `first` with channels last, and set its type and shape."""
    result = node.outputs[0]
    result.name, result.type = name, first.type
    if first.shape is not None:
        result.shape = ir.Shape([first.shape[axis] for axis in TO_LAST])
    return result


def _silu_after(norm: ir.Node) -> tuple[ir.Node, ...]:
    """Return the nodes of x * sigmoid(x) if nothing else reads the result of `norm`."""
    readers = [use.node for use in norm.outputs[0].uses()]
    gates = [node for node in readers if node.op_type == "Sigmoid"]
    products = [node for node in readers if node.op_type == "Mul"]
    if len(readers) != 2 or len(gates) != 1 or len(products) != 1 or norm.outputs[0].is_graph_output():
        return ()
    gate, product = gates[0], products[0]
    whole = {id(value) for value in product.inputs} == {id(norm.outputs[0]), id(gate.outputs[0])}
    return (gate, product) if whole and len(gate.outputs[0].uses()) == 1 else ()


def split_weights(graph: ir.Graph, split: ir.Node) -> None:
    """Replace a matrix product with bias and a following split into equal parts (GEGLU) by one product for each part.

    The split would copy the largest tensor of a transformer block. Splitting the weights instead is free.
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
        matrix = constant(graph, f"{weight.name}.{part}", weights[part])
        shift = constant(graph, f"{bias.name}.{part}", biases[part])
        multiplied = ir.node("MatMul", [product.inputs[0], matrix], name=f"{product.name}.{part}")
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
    """Return the initializer `name` of the graph; add it with `value` if it does not exist."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(np.ascontiguousarray(value).reshape(np.shape(value)), name=name)
    initializer = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(np.shape(value)), const_value=tensor
    )
    graph.initializers.add(initializer)
    return initializer


def replace(graph: ir.Graph, node: ir.Node, by: list[ir.Node], last: ir.Value) -> None:
    """Replace `node` by the nodes `by`, whose result is `last`; the result keeps its name."""
    result = node.outputs[0]
    last.type, last.shape = result.type, result.shape
    graph.insert_before(node, by)
    ir.convenience.replace_all_uses_with(result, last, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    last.name = result.name  # which may be that of one of the graph's results
