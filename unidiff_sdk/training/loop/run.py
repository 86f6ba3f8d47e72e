"""A training run: the loop over steps, its checkpoints and its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

from unidiff_sdk.datasets.synthetic import CATALOGS
from unidiff_sdk.errors import TrainingError
from unidiff_sdk.training.checkpoints.encoders.search_model import SearchModel, TrainableModel
from unidiff_sdk.training.checkpoints.loading.options import RECORDED
from unidiff_sdk.training.checkpoints.saving import save_checkpoint, save_search_model
from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.data.batches import BatchLoader
from unidiff_sdk.training.data.captions import representative_captions
from unidiff_sdk.training.data.pairs import Pairs
from unidiff_sdk.training.objective.tuning import ADAPTERS, save_adapters
from unidiff_sdk.training.runtime.allocator import keep_freed_memory
from unidiff_sdk.training.runtime.attention import ShortAttentionInFloat32
from unidiff_sdk.training.runtime.callbacks import StepReport
from unidiff_sdk.training.runtime.interrupts import InterruptedWithinStep, deferred_interrupts

from .learner import Learner
from .model_selection import ModelSelection
from .resume import Progress, read_finished, restore, unfinished, write_state

__all__ = ["TrainingRun"]


@dataclass
class TrainingRun:
    """Everything that a run needs from step to step.

    Attributes:
        out: The checkpoint folder.
        learner: Takes the steps.
        selection: Validates and chooses the weights.
        checkpoint: The base, whose parts are being tuned.
        pairs: The catalog.
        data_name: Name of the catalog.
        batches: Batches of the catalog.
        prior_pairs: Prior pairs, if there are any.
        prior_batches: Batches of the prior pairs.
        empty_ids: int64[1, tokens], the tokens of "".
        progress: Steps done and their last losses.
        saved_step: Step of the last saved checkpoint. 0: none.
        chosen: How the final weights were chosen, once they are.
    """

    out: Path
    learner: Learner
    selection: ModelSelection
    checkpoint: TrainableModel
    pairs: Pairs
    data_name: str
    batches: BatchLoader
    prior_pairs: Pairs | None
    prior_batches: BatchLoader | None
    empty_ids: Tensor
    progress: Progress = field(default_factory=Progress)
    saved_step: int = 0
    chosen: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # What a resumed run must have in common with the interrupted one, besides the settings.
        self.identity = {
            "base": self.learner.fingerprint,
            "data": self.pairs.sha256,
            "prior": self.prior_pairs.sha256 if self.prior_pairs else None,
            "groups": sha256(self.batches.groups.numpy().tobytes()).hexdigest() if self.config.group else None,
        }

    @property
    def config(self) -> TrainingConfig:
        """Settings of the run."""
        return self.learner.config

    def resume(self) -> bool:
        """Continue from the state in `out`, if there is one. Returns whether the run there is already finished.

        Raises TrainingError if `out` holds another run, CheckpointError if its state cannot be read.
        """
        if unfinished(self.out):
            self.progress = restore(self.out, self.learner, self.selection, self.batches.negatives, self.identity)
            self.saved_step = self.progress.step
        elif self.out.exists():
            self.progress = read_finished(self.out, self.config, self.identity)
            return True
        return False

    def train(self, on_step: Callable[[StepReport], None]) -> None:
        """Train until the last step or early stopping. On an interrupt, save and raise KeyboardInterrupt.

        Raises TrainingError if a loss is not finite or memory is too small. The last saved checkpoint remains.
        """
        try:
            self._loop(on_step)
        except InterruptedWithinStep:  # the state within a step cannot be resumed; the last checkpoint can
            raise
        except KeyboardInterrupt:
            if self.progress.step:
                self.save()
            raise
        except (TrainingError, torch.OutOfMemoryError) as error:
            raise TrainingError(self._explain(error)) from error

    def _loop(self, on_step: Callable[[StepReport], None]) -> None:
        config, progress, selection = self.config, self.progress, self.selection
        in_any = self.learner.processes.any
        attention = nullcontext() if config.checkpoint_activations else ShortAttentionInFloat32()
        with keep_freed_memory(), attention, deferred_interrupts(in_any) as raise_if_interrupted:
            selection.validate_if_due(progress.step)
            while progress.step < config.steps and not selection.should_stop:
                started = time.perf_counter()
                losses = self.learner.step(progress.step, self.batches, self.empty_ids, self.prior_batches)
                progress.step, progress.losses = progress.step + 1, losses
                if self.learner.processes.is_main:
                    seconds = time.perf_counter() - started
                    rate, pairs = self.learner.learning_rate, self.batches.size
                    on_step(StepReport(progress.step, config.steps, losses, rate, seconds, pairs))
                selection.validate_if_due(progress.step)
                if progress.step % config.save_every == 0 and progress.step < config.steps:
                    self.save()
                raise_if_interrupted()

    def finish(self) -> None:
        """Choose the final weights and save them."""
        if self.config.wise_ft and self.saved_step < self.progress.step:
            self.save()  # the sweep validates many times; an interrupt there must not lose the steps
        with self.learner.whole():
            self.chosen = self.selection.choose_weights(self.progress.step)
            self._write(None)
        self.learner.processes.wait()

    def save(self) -> None:
        """Save the averaged weights and the state of the run. All processes must call it together."""
        optimizer = self.learner.optimizer_state()
        with self.learner.whole():
            self._write(optimizer)

    def _write(self, optimizer: Mapping[str, Tensor] | None) -> None:
        """Write the checkpoint. optimizer: its state, see `Learner.optimizer_state`. None: the run is finished."""
        self.saved_step = self.progress.step
        if not self.learner.processes.is_main:
            return
        with self.learner.ema.applied(self.learner.model) as current:

            def write_more(folder: Path) -> None:
                save_adapters(self.checkpoint, folder / ADAPTERS)
                if optimizer is not None:
                    write_state(
                        *(folder, self.learner, self.selection, self.batches.negatives),
                        *(current, optimizer, self.progress, self.identity),
                    )

            how: dict[str, Any] = {"meta": self._metadata(), "keep": self.config.keep, "write_more": write_more}
            if isinstance(self.checkpoint, SearchModel):
                save_search_model(self.out, self.checkpoint, **how)
            else:
                save_checkpoint(self.out, **self.checkpoint.parts(), **how)

    def _explain(self, error: BaseException) -> str:
        """The error of a run that stopped: what happened, what remains, what to do."""
        kept = (
            f"The checkpoint of step {self.saved_step} is kept in {self.out}."
            if self.saved_step
            else "No checkpoint had been saved yet."
        )
        if isinstance(error, torch.OutOfMemoryError):
            return (
                f"{self.learner.processes.device} has too little memory for step {self.progress.step + 1}. {kept} Use "
                "--micro-batch or --checkpoint-activations, which do not change the gradients, or --precision bf16."
            )
        return f"{error}. {kept} Lower the learning rate, or check the data for broken images."

    def _metadata(self) -> dict[str, Any]:
        base, pairs, config = self.checkpoint.meta, self.pairs, self.config
        rendered = all(payload.get("catalog") in CATALOGS for payload in pairs.payloads)
        # Other losses undo a distillation to few steps, so the sampler of a distilled base is not inherited.
        inherited = {"base_model", *RECORDED} | ({"sampler"} if "teacher" not in base else set())
        return {name: base[name] for name in inherited if base.get(name)} | {
            "name": self.out.name,
            **({"encoder": self.checkpoint.kind} if isinstance(self.checkpoint, SearchModel) else {}),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "base": self.checkpoint.name,
            # True if the model has seen the synthetic catalogs only. Searching photographs then warns.
            "synthetic": bool(base.get("synthetic")) and rendered,
            "fit": config.fit or self.checkpoint.fit,
            "captions": representative_captions(pairs.captions),
            "step": self.progress.step,
            "config": asdict(config),
            "losses": self.progress.losses,
            "data": pairs.describe(self.data_name),
            **({"validation": self.selection.latest} if self.selection.latest else {}),
            **({"chosen": self.chosen} if self.chosen else {}),
            "identity": self.identity,
            "versions": {
                "torch": torch.__version__,
                "diffusers": diffusers.__version__,
                "transformers": transformers.__version__,
            },
        }
