"""Large tensors with one row per image: in memory up to a limit, else in a temporary file that the kernel pages."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from unidiff_sdk.errors import DataError

__all__ = ["MEMORY_LIMIT", "allocate_rows"]

MEMORY_LIMIT = 1 << 30  # bytes: the latents of about 65,000 images of 256 px, or 16,000 of 512 px


def allocate_rows(n: int, shape: tuple[int, ...], scratch: Path | None, *, memory_limit: int = MEMORY_LIMIT) -> Tensor:
    """Allocate float32[n, *shape], uninitialized.

    A tensor above the limit is mapped to a file that has no name, so it disappears with the process, however that ends.

    Args:
        n: Number of rows.
        shape: Shape of a row.
        scratch: Folder for the file. Created if missing. Default: the system's temporary folder.
        memory_limit: Size, in bytes, up to which the tensor is in memory.

    Raises:
        DataError: The disk is too small.
    """
    numbers = n * math.prod(shape)
    if 4 * numbers <= memory_limit:
        return torch.empty(n, *shape)
    try:
        if scratch is not None:
            scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=scratch, prefix=".rows-") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * numbers)  # a full disk is an error now, not a signal later
            rows: Tensor = torch.from_file(file.name, shared=True, size=numbers, dtype=torch.float32)
            return rows.view(n, *shape)
    except OSError as error:
        folder = scratch or tempfile.gettempdir()
        raise DataError(
            f"Cannot store {4e-9 * numbers:.1f} GB in {folder}: {error}. The data is too large for memory; free disk "
            "space there, or choose an output folder on a larger disk."
        ) from error
