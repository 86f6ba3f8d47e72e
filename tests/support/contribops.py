"""Contrib operators of ONNX Runtime in PyTorch, for onnx's reference evaluator. The CPU build lacks some of them.

They follow https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch.nn import functional as F


class GroupNorm(OpRun):
    """Group normalization over [batch, height, width, channels], with gamma and beta in float32."""

    op_domain = "com.microsoft"

    def _run(self, x: Any, gamma: Any, beta: Any, activation: int, channels_last: int, epsilon: float, groups: int):  # type: ignore[no-untyped-def, override]
        assert channels_last == 1 and gamma.dtype == beta.dtype == np.float32
        first = torch.tensor(x).float().movedim(-1, 1)
        y = F.group_norm(first, groups, torch.tensor(gamma), torch.tensor(beta), epsilon)
        return ((F.silu(y) if activation else y).movedim(1, -1).numpy().astype(x.dtype),)


class NhwcConv(OpRun):
    """Convolution over [batch, height, width, channels], with weights [out, height, width, in]."""

    op_domain = "com.microsoft"

    def _run(  # type: ignore[no-untyped-def, override]
        self,
        x: Any,
        weight: Any,
        bias: Any = None,
        auto_pad: str = "NOTSET",
        dilations: Any = None,
        group: int = 1,
        kernel_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ):
        assert auto_pad == "NOTSET" and group == 1
        top, left, bottom, right = pads or (0, 0, 0, 0)
        first = F.pad(torch.tensor(x).float().movedim(-1, 1), (left, right, top, bottom))
        kernel = torch.tensor(weight).float().movedim(-1, 1)
        shift = None if bias is None else torch.tensor(bias).float()
        y = F.conv2d(first, kernel, shift, tuple(strides or (1, 1)), dilation=tuple(dilations or (1, 1)))
        return (y.movedim(1, -1).contiguous().numpy().astype(x.dtype),)


class MultiHeadAttention(OpRun):
    """Attention over [batch, length, heads * width]."""

    op_domain = "com.microsoft"

    def _run(self, query: Any, key: Any, value: Any, num_heads: int, scale: float = 0.0, unidirectional: int = 0):  # type: ignore[no-untyped-def, override]
        apart = [torch.tensor(x).float().unflatten(2, (num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        states = F.scaled_dot_product_attention(*apart, is_causal=bool(unidirectional), scale=scale or None)
        return (states.transpose(1, 2).flatten(2).numpy().astype(query.dtype),)


CONTRIB_OPS = [GroupNorm, NhwcConv, MultiHeadAttention]
