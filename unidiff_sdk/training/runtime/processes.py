"""Training in one process, or in several that `accelerate launch` or `torchrun` started.

All processes make the same random choices for the whole batch, and each computes its own share. They exchange sums
only: of embeddings, whose rows each come from one process, and of gradients. `sharding` divides the weights as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn

from unidiff_sdk.errors import TrainingError

__all__ = ["Processes", "pick_device"]

TIMEOUT = timedelta(days=1)  # the other processes wait while the main one generates a prior or validates


@dataclass(frozen=True)
class Processes:
    """The process group of a run.

    Attributes:
        rank: Number of this process, from 0.
        world_size: Number of processes.
        device: Device of this process.
    """

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Join the processes that the launcher started. Raises TrainingError if the device is not available."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, pick_device(device))
        from accelerate import PartialState

        on_cpu = pick_device(device).type == "cpu"
        state = PartialState(cpu=on_cpu, timeout=TIMEOUT, **({"backend": "gloo"} if on_cpu else {}))
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def shard(self, n: int) -> Tensor:
        """int64: the indices below n that this process handles, every `world_size`-th."""
        return torch.arange(self.rank, n, self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of the tensor over all processes."""
        if self.world_size == 1:
            return tensor
        from accelerate.utils import reduce

        summed: Tensor = reduce(tensor, "sum")
        return summed

    def any(self, condition: bool) -> bool:
        """Whether the condition holds in any process. All processes must ask together."""
        if self.world_size == 1:
            return condition
        return bool(self.sum(torch.tensor(float(condition), device=self.device)))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum each parameter's gradient over all processes. A parameter without any gradient stays without one."""
        if self.world_size == 1:
            return
        parameters = list(parameters)
        counts = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device))
        for parameter, count in zip(parameters, counts.tolist(), strict=True):
            if count:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.sum(own)

    def wait(self) -> None:
        """Wait until all processes have arrived here."""
        if self.world_size > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()


def pick_device(name: str) -> torch.device:
    """Device by name. "auto" is the GPU if there is one. Raises TrainingError if the device is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("This PyTorch finds no CUDA device. Use --device cpu, or install a CUDA build of PyTorch.")
    return torch.device(name)
