"""Fully sharded data parallelism: each process stores a share of the weights, of their gradients and of the optimizer.

Zhao et al. 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel", in its second version (FSDP2). A
block gathers its weights for its forward and backward pass and frees them afterwards. Every process must therefore run
the same blocks in the same order. Weights outside blocks, such as the temperature, stay whole in every process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from .processes import Processes

__all__ = ["clip_gradients", "is_sharded", "local_share", "shard_blocks", "share_like", "unsharded", "whole_tensor"]


def shard_blocks(model: nn.Module, processes: Processes) -> list[FSDPModule]:
    """Shard the blocks of a model over all processes, in place. Returns them, outer blocks before inner ones.

    Blocks are the modules that diffusers and transformers declare indivisible: transformer layers, residual blocks and
    embeddings. Gradients of sharded weights are sums over the processes, as those of `Processes.sum_gradients`.
    """
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    sharded = [fully_shard(block, mesh=mesh, reshard_after_forward=True) for block in reversed(blocks)]
    for block in sharded:
        block.set_gradient_divide_factor(1.0)
        block.set_force_sum_reduction_for_comms(True)  # gloo has no reduction that divides
    return sharded[::-1]


@contextmanager
def unsharded(blocks: Sequence[FSDPModule], *, keep: bool) -> Iterator[None]:
    """Within the block, the model has whole weights in the processes that `keep` them, which can use it alone.

    All processes must enter together. Changes of the weights are lost at the end.
    """
    for block in blocks:
        block.unshard()
        if keep:
            block.set_reshard_after_forward(False, recurse=False)
        else:
            block.reshard()
    try:
        yield
    finally:
        for block in blocks if keep else ():
            block.set_reshard_after_forward(True, recurse=False)
            block.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process stores only a share of the tensor."""
    return isinstance(tensor, DTensor)


def local_share(tensor: Tensor) -> Tensor:
    """The values that this process stores, in the same memory: all of them, unless the tensor is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor with the shares of all processes, which must call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def share_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The share of a whole tensor that belongs to this process, on the device of `like`, which has the same shape."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # all have the whole


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale the gradients to a norm of at most `max_norm`. Returns their norm before: that of all shares together."""
    reached = [p for p in parameters if p.grad is not None]
    # One operation takes either kind of tensor, not both.
    kinds = [kind for sharded in (False, True) if (kind := [p for p in reached if is_sharded(p) is sharded])]
    norms = [whole_tensor(get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        clip_grads_with_norm_(kind, max_norm, norm)
    return float(norm)
