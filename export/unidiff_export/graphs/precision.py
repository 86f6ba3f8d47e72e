"""How numbers are stored and computed: lossless half storage, and which modules half precision can hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

HALF_MAX = 65504.0
# Inputs seen in verification are a sample of those to come: leave them twice the room.
HEADROOM = 2.0
# Below this a Cast node takes more bytes than half storage saves.
SMALLEST_STORED_AS_HALF = 256
# So many weights mostly tell already that half precision does not hold them all.
TELLING = 4096


def store_halves(model: ir.Model) -> int:
    """Store each float32 weight that half precision holds exactly as half, followed by a `Cast` back.

    Nothing is lost: the graph computes in float32 with the same values, and ONNX Runtime folds the casts when it
    loads the file. Changes `model` in place and returns the bytes saved.
    """
    saved = 0
    for value in list(model.graph.initializers.values()):
        weights = value.const_value
        if weights is None or weights.dtype != ir.DataType.FLOAT or weights.size < SMALLEST_STORED_AS_HALF:
            continue
        halves = exact_halves(weights.numpy())
        if halves is not None:
            _cast_from(model.graph, value, halves)
            saved += halves.nbytes
    return saved


def exact_halves(weights: np.ndarray) -> np.ndarray | None:
    """float32 `weights` as float16 if not one of them changes by it, else None."""
    with np.errstate(over="ignore"):
        for part in (weights.reshape(-1)[:TELLING], weights):
            halves = part.astype(np.float16)
            if not np.array_equal(halves.astype(np.float32), part):
                return None
    return halves


def _cast_from(graph: ir.Graph, value: ir.Value, halves: np.ndarray) -> None:
    stored = ir.Value(
        name=f"{value.name}.half",
        type=ir.TensorType(ir.DataType.FLOAT16),
        shape=value.shape,
        const_value=ir.tensor(halves),
    )
    cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT)], name=f"{value.name}.cast")
    ir.convenience.replace_all_uses_with(value, cast.outputs[0])
    name = value.name
    assert name is not None  # initializers are keyed by their names
    del graph.initializers[name]
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, value.type, value.shape
    graph.initializers.add(stored)
    graph.insert_before(graph[0], cast)


def overflows_half(module: nn.Module, inputs: Sequence[Tensor]) -> bool:
    """Whether any intermediate result of `module(*inputs)` comes too near half precision's largest number.

    Measured in float32 PyTorch: ONNX Runtime's CPU kernels widen half to float, which would hide an overflow that a
    GPU shows as a black picture.
    """
    # Attention in single steps, as some targets have it: fused, its products are not seen.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Peak() as peak:
        module(*inputs)
    return peak.value * HEADROOM > HALF_MAX


class _Peak(TorchDispatchMode):
    """The largest finite magnitude that any floating-point operation returned."""

    value = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                finite = tensor.nan_to_num(0.0, 0.0, 0.0)  # masks hold minus infinity on purpose
                self.value = max(self.value, finite.abs().max().item())
        return result
