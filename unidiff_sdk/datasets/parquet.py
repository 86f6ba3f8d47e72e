"""The way to pyarrow, which only those need who keep tables or archives in parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unidiff_sdk.errors import DataError

__all__ = ["open_parquet", "pyarrow_parquet"]


def pyarrow_parquet(purpose: str) -> Any:
    """The module `pyarrow.parquet`. Raises DataError, which names the extra that brings it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{purpose}: parquet needs pyarrow: pip install 'unidiff-sdk[parquet]'") from error
    return pyarrow.parquet


def open_parquet(path: Path) -> Any:
    """A `pyarrow.parquet.ParquetFile`. Raises DataError if it cannot be read."""
    parquet = pyarrow_parquet(str(path))
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
