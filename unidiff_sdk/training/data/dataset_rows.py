"""Rows of numbers, one a picture, that may be more than memory holds: then they lie in a file that the kernel pages."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from unidiff_sdk.errors import DataError

__all__ = ["empty_rows"]

MEMORY = 1 << 30  # bytes: latents of some 65,000 pictures of 256 px, or 16,000 of 512 px


def empty_rows(n: int, shape: tuple[int, ...], scratch: Path | None) -> Tensor:
    """float32[n, *shape], not filled: in memory up to `MEMORY` bytes, beyond that in a file in the folder `scratch`.

    scratch: made if it is not there; default: the system's for temporary files. The file has no name, so that it goes
    with the process whatever ends it. Raises DataError where the disk is too small for it.
    """
    numbers = n * math.prod(shape)
    if 4 * numbers <= MEMORY:
        return torch.empty(n, *shape)
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=scratch, prefix=".rows-") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * numbers)  # a full disk is told now, not by a signal later
            rows: Tensor = torch.from_file(file.name, shared=True, size=numbers, dtype=torch.float32)
            return rows.view(n, *shape)
    except OSError as error:
        where = scratch or tempfile.gettempdir()
        raise DataError(
            f"{4e-9 * numbers:.1f} GB, which are too many for memory, cannot lie in {where}: {error}"
        ) from error
