"""Several processes that train one model together, as `accelerate launch` or `torchrun` starts them; or a single one.

Every process draws the same for the whole batch and computes its own share of it, so all that must be exchanged are
sums: of embeddings, each row of which one process has, and of gradients.
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

LONGEST_WAIT = timedelta(days=1)


@dataclass(frozen=True)
class Processes:
    """rank: this process's number, from 0; world: how many there are; device: where this one computes."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Meet the others that the launcher started. Raises TrainingError for a device that is not there."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, pick_device(device))
        from accelerate import PartialState

        on_cpu = pick_device(device).type == "cpu"
        # The others wait while the main process draws a prior, looks, or sweeps.
        state = PartialState(cpu=on_cpu, timeout=LONGEST_WAIT, **({"backend": "gloo"} if on_cpu else {}))
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def mine(self, n: int) -> Tensor:
        """int64: which of n rows are this process's, every `world`-th."""
        return torch.arange(self.rank, n, self.world)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.world == 1:
            return tensor
        from accelerate.utils import reduce

        summed: Tensor = reduce(tensor, "sum")
        return summed

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up what every process's share of the batch has taught. A parameter that none has taught stays without."""
        if self.world == 1:
            return
        parameters = list(parameters)
        taught = self.sum(torch.tensor([float(p.grad is not None) for p in parameters], device=self.device))
        learners = [p for p, count in zip(parameters, taught.tolist(), strict=True) if count]
        for learner in learners:
            learner.grad = self.sum(torch.zeros_like(learner) if learner.grad is None else learner.grad)

    def wait(self) -> None:
        """For all others."""
        if self.world > 1:
            from accelerate.utils import wait_for_everyone

            wait_for_everyone()


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises TrainingError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("no CUDA device is available to this PyTorch; use --device cpu")
    return torch.device(name)
