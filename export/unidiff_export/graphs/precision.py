"""Float precision: lossless storage in half precision, and the check that a module does not overflow it."""

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
# The inputs of verification are only a sample, so allow values twice as large.
HEADROOM = 2.0
# With fewer weights, a Cast node takes more bytes than half precision saves.
MIN_STORED_AS_HALF = 256
# The first weights usually show whether half precision represents all of them.
FIRST_WEIGHTS = 4096


def store_halves(model: ir.Model) -> int:
    """Store float32 weights in half precision where that is exact, followed by a `Cast` back; return the bytes saved.

    The graph computes in float32 with the same values, and ONNX Runtime folds the casts when it loads the file. Changes
    `model` in place.
    """
    saved = 0
    for value in list(model.graph.initializers.values()):
        weights = value.const_value
        if weights is None or weights.dtype != ir.DataType.FLOAT or weights.size < MIN_STORED_AS_HALF:
            continue
        halves = exact_halves(weights.numpy())
        if halves is not None:
            _cast_from(model.graph, value, halves)
            saved += halves.nbytes
    return saved


def exact_halves(weights: np.ndarray) -> np.ndarray | None:
    """Return float32 `weights` as float16 if this changes none of them, else None."""
    exact = torch.from_numpy(weights)  # PyTorch converts on all cores
    for part in (exact.reshape(-1)[:FIRST_WEIGHTS], exact):
        halves = part.half()
        if not torch.equal(halves.float(), part):
            return None
    return halves.numpy()


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
    """Return whether an intermediate result of `module(*inputs)` comes close to half precision's largest number.

    The check runs in float32 PyTorch, because ONNX Runtime's CPU kernels widen half to float and would hide an overflow
    that a GPU turns into a black image.
    """
    # Attention in single steps, as some targets compute it. Fused attention would hide its products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Peak() as peak:
        module(*inputs)
    return peak.value * HEADROOM > HALF_MAX


class _Peak(TorchDispatchMode):
    """Record the largest finite magnitude that any floating-point operation returns."""

    value = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
                finite = tensor.nan_to_num(0.0, 0.0, 0.0)  # masks contain minus infinity on purpose
                self.value = max(self.value, finite.abs().max().item())
        return result
