"""TensorBoard output of a run. Needs the `tensorboard` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.evaluation.validation import ValidationRecord
from unidiff_sdk.training.runtime.callbacks import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes scalars and samples for TensorBoard; a `RunCallback`.

    Scalars: loss/TERM, optimizer/learning_rate, throughput/pairs_per_second, validation/FIGURE. Images:
    validation/samples.

    folder: Created if missing. Raises OptionError if the tensorboard package is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError(
                f"--tensorboard needs the tensorboard package ({error}). Run pip install 'unidiff-sdk[tensorboard]'."
            ) from error
        self._make = SummaryWriter
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def on_step(self, report: StepReport) -> None:
        """Write losses, learning rate and throughput."""
        writer = self._at(report.step)
        for name, value in report.losses.items():
            writer.add_scalar(f"loss/{name}", value, report.step)
        writer.add_scalar("optimizer/learning_rate", report.learning_rate, report.step)
        writer.add_scalar("throughput/pairs_per_second", report.pairs / report.seconds, report.step)

    def on_validation(self, record: ValidationRecord) -> None:
        """Write the figures, and the samples next to each other."""
        writer = self._at(record.step)
        for name, value in record.figures.items():
            writer.add_scalar(f"validation/{name.replace(' ', '/')}", value, record.step)
        if record.samples:
            samples = np.concatenate(record.samples, axis=1)
            writer.add_image("validation/samples", samples, record.step, dataformats="HWC")
        writer.flush()

    def close(self) -> None:
        """Write what is still buffered."""
        if self._writer:
            self._writer.close()

    def _at(self, step: int) -> SummaryWriter:
        if self._writer is None:  # purge_step hides what an interrupted run wrote from this step on
            self._writer = self._make(str(self.folder), purge_step=step)
        return self._writer
