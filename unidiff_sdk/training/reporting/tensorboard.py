"""A run as TensorBoard shows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.evaluation.validation import Validation
from unidiff_sdk.training.runtime.callbacks import StepReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes scalars and samples to a folder. Raises OptionError if the tensorboard package is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise OptionError(
                f"--tensorboard needs the tensorboard package: pip install 'unidiff-sdk[tensorboard]' ({error})"
            ) from error
        self._make = SummaryWriter
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def on_step(self, report: StepReport) -> None:
        """Losses, learning rate and throughput."""
        writer = self._at(report.step)
        for name, value in report.losses.items():
            writer.add_scalar(f"loss/{name}", value, report.step)
        writer.add_scalar("run/learning rate", report.learning_rate, report.step)
        writer.add_scalar("run/pairs a second", report.pairs / report.seconds, report.step)

    def on_validation(self, validation: Validation) -> None:
        """Figures, and the samples side by side."""
        writer = self._at(validation.step)
        for name, value in validation.figures.items():
            writer.add_scalar(f"validation/{name}", value, validation.step)
        writer.add_image(
            "validation/samples", np.concatenate(validation.samples, axis=1), validation.step, dataformats="HWC"
        )
        writer.flush()

    def close(self) -> None:
        """Write out what is left."""
        if self._writer:
            self._writer.close()

    def _at(self, step: int) -> SummaryWriter:
        if self._writer is None:  # what an interrupted run wrote from this step on is hidden
            self._writer = self._make(str(self.folder), purge_step=step)
        return self._writer
