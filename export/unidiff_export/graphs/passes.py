"""Rewritings of float graphs into what ONNX Runtime's kernels run faster; each is here because it was measured.

They find operators, not patterns of an exporter's making, and leave alone what is not exactly as they expect.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from unidiff_export.options import CONTRIB, STANDARD

# From so many keys on, attention in blocks is the faster on a CPU.
MANY_KEYS = 1024
# The CUDA kernel of GroupNorm takes two channels a thread, and a whole group in a block.
LARGEST_GROUP = 256
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
ELEMENTWISE = {"Add", "Cast", "Div", "Mul", "Sigmoid", "Sub"}


def rewrite_for_cpu(model: ir.Model, usual: Mapping[str, int]) -> None:
    """Those for the CPU, in place. `usual`: what the dynamic axes most often are."""
    for node in list(model.graph):
        if node.op_type == "GroupNormalization":
            expand_group_norm(model.graph, node)
        elif node.op_type == "Split":
            split_weights(model.graph, node)
        elif node.op_type == "Attention" and node.domain == STANDARD:
            attend_in_blocks(model.graph, node, usual)
    if any(node.domain == CONTRIB for node in model.graph):
        model.opset_imports.setdefault(CONTRIB, 1)


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


def attend_in_blocks(graph: ir.Graph, node: ir.Node, usual: Mapping[str, int]) -> None:
    """Attention over many keys as com.microsoft::MultiHeadAttention, which goes over them in blocks.

    The former holds all scores at once: at 64 x 64 latents, 1 GiB for a batch of 2. The latter takes and gives
    [batch, length, heads * width]; ONNX Runtime cancels the transpositions with those around.
    """
    shapes = [value.shape for value in node.inputs if value is not None]
    causal = node.attributes.get_int("is_causal", 0)
    if len(node.inputs) != 3 or None in shapes or causal:
        return
    (_, heads, _, width), (_, _, keys, _) = (shape.evaluate(usual) for shape in shapes[:2] if shape is not None)
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
    """Those for ONNX Runtime's CUDA kernels, in place: see `ChannelsLast`. Whether there was anything to rewrite."""
    layout = ChannelsLast(model.graph)
    for node in list(model.graph):
        layout.rewrite(node)
    if layout.changed:
        model.opset_imports.setdefault(CONTRIB, 1)
        RemoveUnusedNodesPass()(model)
    return layout.changed


class ChannelsLast:
    """Pictures as [batch, height, width, channels], in which tensor cores convolve, from the first layer to the last.

    Convolutions become com.microsoft::NhwcConv, and group norms with the SiLU after them com.microsoft::GroupNorm; ONNX
    Runtime has no kernel of its own for GroupNormalization on a GPU either. What stands between them is turned with
    them. It could turn convolutions itself (`prefer_nhwc`), but then computes shapes on the GPU, and no graph can be
    captured.

    Attributes:
        changed: whether there was anything to rewrite.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self.changed = False
        self._graph = graph
        self._last: dict[ir.Value, ir.Value] = {}  # a value with channels first, and the same with channels last

    def rewrite(self, node: ir.Node) -> None:
        """Rewrite `node`, whose predecessors have been, if it is one that is better off so."""
        if node.graph is None or node.domain != STANDARD:  # None: the rest of a SiLU
            return
        if node.op_type == "Transpose":
            self._transpose(node)
        elif node.op_type == "Conv":
            self._convolution(node)
        elif node.op_type == "GroupNormalization":
            self._group_norm(node)
        elif any(value in self._last for value in node.inputs):
            if node.op_type in ELEMENTWISE:
                self._elementwise(node)
            elif node.op_type == "Concat" and node.attributes["axis"].as_int() in (1, -3):
                self._put(node, "Concat", [self._turned(value, node) for value in node.inputs if value], {"axis": 3})
            elif node.op_type == "Resize":
                self._resize(node)

    def _transpose(self, node: ir.Node) -> None:
        (value,), perm = node.inputs, tuple(node.attributes["perm"].as_ints())
        if value is not None and perm == TO_FIRST:
            self._last[node.outputs[0]] = value
        elif value in self._last and perm == TO_LAST and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(self._last[value])

    def _convolution(self, node: ir.Node) -> None:
        x, weight, *bias = node.inputs
        if x is not None and weight is not None and weight.shape is not None and len(weight.shape) == 4:
            # ONNX Runtime turns the weights when it loads them.
            inputs = [self._turned(x, node), self._turned(weight, node), *bias]
            self._put(node, "NhwcConv", inputs, node.attributes, domain=CONTRIB)

    def _group_norm(self, node: ir.Node) -> None:
        x, scale, bias = node.inputs
        assert x is not None and scale is not None and bias is not None
        if x.shape is None or len(x.shape) != 4 or scale.const_value is None or bias.const_value is None:
            return
        groups = node.attributes.get_int("num_groups")
        width = scale.const_value.size // groups
        if width % 2 or width > LARGEST_GROUP:
            return
        # The kernel wants them in float32, whatever x is.
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
        self._put(last, "GroupNorm", [self._turned(x, node), gamma, beta], settings, domain=CONTRIB)
        if activation:
            self._graph.remove([activation[0], node], safe=True)
        for value in (scale, bias):
            if not value.uses():
                self._graph.initializers.pop(str(value.name), None)

    def _elementwise(self, node: ir.Node) -> None:
        """Of pictures, and numbers that are the same for all of one."""
        shapes = [value.shape for value in node.inputs if value is not None]
        if any(shape is None or len(shape) not in (0, 4) for shape in shapes):
            return
        inputs = [self._turned(value, node) if value.shape else value for value in node.inputs if value is not None]
        self._put(node, node.op_type, inputs, node.attributes)

    def _resize(self, node: ir.Node) -> None:
        x, roi, scales, *sizes = [*node.inputs, None, None][:4]
        if any(sizes) or roi is not None or scales is None or scales.const_value is None or "axes" in node.attributes:
            return
        turned = constant(self._graph, f"{scales.name}.last", scales.const_value.numpy()[list(TO_LAST)])
        assert x is not None
        self._put(node, "Resize", [self._turned(x, node), None, turned], node.attributes)

    def _turned(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """`value` with channels last."""
        if value not in self._last:
            turn = ir.node("Transpose", [value], {"perm": TO_LAST}, name=f"{value.name}.turn")
            self._graph.insert_before(before, [turn])
            self._last[value] = _named(turn, f"{value.name}.last", value)
        return self._last[value]

    def _put(self, node: ir.Node, operator: str, inputs: list, attributes: Mapping, domain: str = STANDARD) -> None:
        """Compute what `node` does by an operator with channels last, and from that what it gave."""
        result = node.outputs[0]
        made = ir.node(operator, inputs, attributes, domain=domain, name=node.name)
        last = _named(made, f"{result.name}.last", result)
        back = ir.node("Transpose", [last], {"perm": TO_FIRST}, name=f"{node.name}.back")
        replace(self._graph, node, [made, back], back.outputs[0])
        self._last[back.outputs[0]] = last
        self.changed = True


def _named(node: ir.Node, name: str, first: ir.Value) -> ir.Value:
    """The result of `node`, which is `first` with channels last."""
    result = node.outputs[0]
    result.name, result.type = name, first.type
    if first.shape is not None:
        result.shape = ir.Shape([first.shape[axis] for axis in TO_LAST])
    return result


def _silu_after(norm: ir.Node) -> tuple[ir.Node, ...]:
    """The nodes of x * sigmoid(x) if they are all that reads the result of `norm`."""
    readers = [use.node for use in norm.outputs[0].uses()]
    gates = [node for node in readers if node.op_type == "Sigmoid"]
    products = [node for node in readers if node.op_type == "Mul"]
    if len(readers) != 2 or len(gates) != 1 or len(products) != 1 or norm.outputs[0].is_graph_output():
        return ()
    gate, product = gates[0], products[0]
    whole = {id(value) for value in product.inputs} == {id(norm.outputs[0]), id(gate.outputs[0])}
    return (gate, product) if whole and len(gate.outputs[0].uses()) == 1 else ()


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
    """The initializer `name` of the graph, made of `value` if it is not there yet."""
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
