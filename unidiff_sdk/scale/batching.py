"""How many images a process encodes at once, so that all processes of a machine fit into its memory.

    images = half of the free memory / processes of the machine / bytes of an image

rounded down, from 1 to the rows of a chunk. The bytes of an image are measured while the first images of the job are
encoded: one, which also loads the model, and then `MEASURED_IMAGES`. The other half of the memory is left to reading,
storing and the page cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from unidiff_sdk._internal.memory import available_memory, peak_memory

from .parts import CHUNK_ROWS

__all__ = ["MEASURED_IMAGES", "BatchSize", "images_at_once"]

MEASURED_IMAGES = 4


def images_at_once(free: int, processes: int, image_bytes: float) -> int:
    """The rule above.

    Args:
        free: bytes that can be allocated on the machine.
        processes: those that encode there, at least 1.
        image_bytes: what encoding one more image at once takes, above 0.
    """
    return int(min(CHUNK_ROWS, max(1, free / 2 / processes / image_bytes)))


class BatchSize:
    """The number of images that one process encodes at once.

    Args:
        fixed: the number that the caller chose; None for the rule.
        processes: those that encode on one machine.

    Attributes:
        size: for the next batch.
    """

    def __init__(self, fixed: int | None, processes: int) -> None:
        self.size = fixed or 1
        self._processes = processes
        self._unmeasured = 0 if fixed else 2  # batches before the rule can be applied

    @contextmanager
    def measured(self, images: int, pixel_bytes: int) -> Iterator[None]:
        """Measure a batch while it is encoded.

        Args:
            images: the number of its images.
            pixel_bytes: the bytes of one as the encoder takes it.
        """
        if self._unmeasured == 0 or images < self.size:  # the last batch of a chunk can be too short to measure
            yield
            return
        with peak_memory() as peak:
            yield
        self._unmeasured -= 1
        free = available_memory()
        if self._unmeasured:
            self.size = MEASURED_IMAGES
        elif peak.growth is None or free is None:  # the operating system does not report it
            self.size = CHUNK_ROWS
        else:  # the memory of one image was taken by the batch before
            image_bytes = pixel_bytes + peak.growth / (MEASURED_IMAGES - 1)
            self.size = images_at_once(free + peak.growth, self._processes, image_bytes)
