"""Opening parquet files. pyarrow is an optional dependency and is imported on first use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from unidiff_sdk.errors import DataError

__all__ = ["open_parquet", "pyarrow_parquet"]


def pyarrow_parquet(purpose: str) -> Any:
    """Return the module `pyarrow.parquet`. Raises DataError if pyarrow is not installed."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{purpose}: parquet needs pyarrow. Run: pip install 'unidiff-sdk[parquet]'") from error
    return pyarrow.parquet


def open_parquet(path: Path) -> Any:
    """Open a `pyarrow.parquet.ParquetFile`. Raises DataError if the file cannot be read."""
    parquet = pyarrow_parquet(str(path))
    if not path.is_file():
        raise DataError(f"{path}: {'is a folder' if path.is_dir() else 'there is no such file'}. Give a parquet file.")
    import pyarrow

    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
