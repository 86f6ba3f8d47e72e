"""Attention over short sequences in float32, on processors where half precision is slower."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["ShortAttentionInFloat32"]

LONGEST = 512  # tokens; at 1,024 half precision is as fast


class ShortAttentionInFloat32(TorchFunctionMode):
    """Within the block, attention over at most 512 tokens on a CPU runs in float32 instead of half precision.

    PyTorch's attention for CPUs takes 8 to 12 times as long in bfloat16 as in float32 at 32 to 65 tokens, the lengths
    of the tiny architecture (forward and backward, one thread of a Xeon with AMX, torch 2.13). The result has the
    type of the inputs. Not for checkpointed activations: PyTorch recomputes them outside such blocks.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch."""
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, *others: Any, **options: Any) -> Tensor:
    """`scaled_dot_product_attention`, in float32 where that is faster."""
    inputs = (query, key, *others)
    is_short = max(query.shape[-2], key.shape[-2]) <= LONGEST
    if not (query.device.type == "cpu" and query.dtype.itemsize == 2 and is_short):
        return F.scaled_dot_product_attention(*inputs, **options)
    options = {name: _widened(value) for name, value in options.items()}
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(*map(_widened, inputs), **options).to(query.dtype)


def _widened(value: Any) -> Any:
    """Half-precision tensors as float32, anything else as it is."""
    is_half = isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
    return value.float() if is_half else value
