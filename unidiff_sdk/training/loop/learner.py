"""The learner: model, optimizer and averaged weights, and the state from which a run resumes bit for bit."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from unidiff_sdk.errors import CheckpointError, TrainingError
from unidiff_sdk.training.config import Component, DistillationConfig, TrainingConfig
from unidiff_sdk.training.data.batches import BatchLoader
from unidiff_sdk.training.objective.encoder_model import EncoderModel
from unidiff_sdk.training.objective.tuning import component_of
from unidiff_sdk.training.runtime.processes import Processes
from unidiff_sdk.training.runtime.sharding import (
    clip_gradients,
    is_sharded,
    local_share,
    shard_blocks,
    share_like,
    unsharded,
    whole_tensor,
)

from .gradients import backpropagate

__all__ = ["Ema", "Learner", "learning_rate_factor"]

WEIGHTS, AVERAGED, OPTIMIZER = "weights.safetensors", "averaged.safetensors", "optimizer.safetensors"
LOWEST_SCALE = 1.0  # loss scale in half precision; gradients that overflow at this scale have another cause
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")  # of torch.optim.AdamW


class Learner:
    """Takes optimizer steps. Between steps, everything they depend on can be saved and restored.

    With `config.shard`, the model's blocks are sharded from now on, and with them the optimizer's state and the
    averaged weights.
    """

    def __init__(self, model: EncoderModel, config: TrainingConfig, processes: Processes) -> None:
        self.model = model
        self.config = config
        self.processes = processes
        self.fingerprint = fingerprint(model)
        self.blocks = shard_blocks(model, processes) if config.shard else []
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        # Fused: one pass over each weight, a tenth of the time on a CPU.
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(self.trainable, config), lr=config.learning_rate, fused=True
        )
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=config.precision == "fp16")
        self.ema = Ema(model, config.ema_decay)
        self.learning_rate = 0.0  # of the last step

    def step(
        self, step: int, batches: BatchLoader, empty_ids: Tensor, prior: BatchLoader | None = None
    ) -> dict[str, float]:
        """Take step `step`, from 0. Returns the value of each term. Raises TrainingError if one is not finite."""
        batches.refresh_negatives(step, self.processes, together=self.config.shard)

        # 1. gradients
        self.optimizer.zero_grad(set_to_none=True)
        losses = backpropagate(
            self.model,
            batches,
            self.config,
            step=step,
            empty_ids=empty_ids,
            processes=self.processes,
            prior=prior,
            scale=float(self.scaler.scale(torch.ones((), device=self.processes.device))),
        )
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.trainable.values(), self.config.gradient_clip)
        self._require_finite(step, losses, norm)

        # 2. weights
        factor = learning_rate_factor(step, self.config)
        self.learning_rate = self.config.learning_rate * factor
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.clamp_temperature()
        self.ema.update(self.model)
        return losses

    def _require_finite(self, step: int, losses: Mapping[str, float], norm: float) -> None:
        # In half precision, a loss scale that is too high gives an infinite norm. The scaler skips the step and lowers
        # the scale.
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > LOWEST_SCALE
        if not all(map(math.isfinite, losses.values())) or not (math.isfinite(norm) or overflow):
            figures = ", ".join(f"{name} {value:.3g}" for name, value in losses.items())
            raise TrainingError(f"Step {step + 1} is not finite ({figures}; gradient norm {norm:.3g})")

    @contextmanager
    def averaged_for_use(self) -> Iterator[None]:
        """Within the block, the model holds the averaged weights, in eval mode and without gradients."""
        with self.model.evaluating(), self.ema.applied(self.model):
            yield

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block, model and averaged weights are whole in the main process, which can use them alone.

        All processes must enter together. Without sharding, they are always whole.
        """
        if not self.blocks:
            yield
            return
        shares = self.ema.weights
        self.ema.weights = self._gather(shares)
        try:
            with unsharded(self.blocks, keep=self.processes.is_main):
                yield
        finally:
            self.ema.weights = shares

    def optimizer_state(self) -> dict[str, Tensor]:
        """The optimizer's state as "parameter/key". All processes must call it, and the main one has the result."""
        return self._gather(
            {
                f"{name}/{key}": self.optimizer.state[p][key]
                for name, p in self.trainable.items()
                if p in self.optimizer.state  # parameters that no term has reached have no state
                for key in OPTIMIZER_STATE
            }
        )

    def _gather(self, shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gathered = ((name, whole_tensor(share)) for name, share in shares.items())
        return {name: tensor for name, tensor in gathered if self.processes.is_main}

    def save(self, folder: Path, weights: Mapping[str, Tensor], optimizer: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write the state into a new folder, as safetensors. Returns the part of it that JSON can hold.

        The state is whole, so that a run with any number of processes can restore it.

        Args:
            weights: The current trainable weights, named as in the model. The model itself may hold the averaged ones.
            optimizer: see `optimizer_state`.
        """
        folder.mkdir()
        files: dict[str, Mapping[str, Tensor]] = {WEIGHTS: weights, AVERAGED: self.ema.weights, OPTIMIZER: optimizer}
        for file, tensors in files.items():
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / file)
        return {"averaged_updates": self.ema.updates, "scaler": self.scaler.state_dict()}

    @torch.no_grad()
    def restore(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Restore a state that `save` wrote. Raises CheckpointError if it does not fit or cannot be read."""
        try:
            weights, averaged, optimizer = (load_file(folder / file) for file in (WEIGHTS, AVERAGED, OPTIMIZER))
            for name, parameter in self.trainable.items():
                parameter.copy_(share_like(weights[name], parameter))
                self.ema.weights[name].copy_(share_like(averaged[name], parameter))
                if f"{name}/{OPTIMIZER_STATE[0]}" in optimizer:
                    state_of = {key: optimizer[f"{name}/{key}"] for key in OPTIMIZER_STATE}
                    self.optimizer.state[parameter] = {
                        key: share_like(value, parameter) if value.ndim else value.to(parameter.device)
                        for key, value in state_of.items()
                    }
            self.ema.updates = int(state["averaged_updates"])
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # safetensors and torch raise any error of their parsers
            raise CheckpointError(f"Cannot resume from {folder}: {error!r}. Remove it to start again.") from error


class Ema:
    """Exponential moving average of a model's trainable parameters, named as in the model."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """w̄ ← d·w̄ + (1-d)·w. d rises from 0.18 to `decay`, so that the average of a short run forgets the base."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged = [local_share(weight) for weight in self.weights.values()]
        current = [local_share(p.detach()) for p in model.parameters() if p.requires_grad]
        torch._foreach_lerp_(averaged, current, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Within the block, the model holds the averaged weights. Yields the current ones, named as in the model."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        current = {name: p.data for name, p in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.data = self.weights[name]
            yield current
        finally:
            for name, parameter in parameters.items():
                parameter.data = current[name]


def fingerprint(model: nn.Module) -> str:
    """sha256 of the first values of every tensor: identifies the base without hashing all of it."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def learning_rate_factor(step: int, config: TrainingConfig | DistillationConfig) -> float:
    """Factor of the peak learning rate: linear from 1/warmup to 1, then half a cosine to 0. step: from 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _parameter_groups(trainable: Mapping[str, nn.Parameter], config: TrainingConfig) -> list[dict[str, Any]]:
    """Optimizer groups by component, with its peak learning rate as "peak".

    Matrices decay. Biases, norms and the temperature do not. One operation of the optimizer takes sharded weights or
    whole ones, not both.
    """
    groups: list[dict[str, Any]] = []
    for component in Component:
        own = [p for name, p in trainable.items() if component_of(name) is component]
        peak = config.peak_learning_rate(component)
        for decay, params in (
            (config.weight_decay, [p for p in own if p.ndim > 1]),
            (0.0, [p for p in own if p.ndim <= 1]),
        ):
            for sharded in (False, True):
                kind = [p for p in params if is_sharded(p) is sharded]
                groups.append({"params": kind, "weight_decay": decay, "peak": peak})
    return [group for group in groups if group["params"]]
