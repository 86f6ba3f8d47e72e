"""Timesteps in ONNX: one for each sample, or a single one for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

# Shape with start and end, and Expand, have not changed since this opset; the exporter converts them to the target's.
SYMBOLIC_OPSET = 18


def one_for_each_sample(timestep: Tensor, sample: Tensor) -> Tensor:
    """Repeat a single timestep for each sample in an exported graph. PyTorch's own models do that by themselves.

    Expressed in ONNX, because torch.export would fix the number of timesteps to the batch size, and optimum's pipelines
    pass a single timestep.
    """
    if not torch.onnx.is_in_onnx_export():
        return timestep
    batch = torch.onnx.ops.symbolic(
        "Shape", [sample], {"start": 0, "end": 1}, dtype=torch.int64, shape=[1], version=SYMBOLIC_OPSET
    )
    expanded: Tensor = torch.onnx.ops.symbolic(
        "Expand", [timestep, batch], dtype=torch.float32, shape=[sample.shape[0]], version=SYMBOLIC_OPSET
    )
    return expanded
