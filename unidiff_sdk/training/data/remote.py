"""Training data in object storage: each machine copies the shards once, and its processes read the copies."""

from __future__ import annotations

import os
from pathlib import Path

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk.errors import DataError, OptionError
from unidiff_sdk.store.images.object_storage import is_object_storage

__all__ = ["local_data"]


def local_data(data: str | Path, out: Path, copies: str | Path | None) -> Path:
    """The data on this machine: the path itself, or copies of the shards at a URL, see `scale.copies.copy_shards`.

    Args:
        data: A path or a URL.
        out: The checkpoint folder.
        copies: Folder for the copies. Default: next to `out`.

    Raises:
        OptionError: `copies` is given, but `data` is not a URL.
        DataError: The path is invalid, there is nothing that can be read, or the copies need more space than there is.
        StoreError: The object storage cannot be read.
    """
    if not is_object_storage(os.fspath(data)):
        if copies is not None:
            raise OptionError(f"copies has no effect: {data} is not in object storage. Omit it.")
        return checked_path(data, DataError)
    from unidiff_sdk.scale.copies import copy_shards  # with its package, which most runs do not need

    return copy_shards(str(data), Path(copies) if copies is not None else out.with_name(f"{out.name}.data"))
