"""JSON objects in files, with errors that name the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff_sdk._internal import json_values
from unidiff_sdk._internal.text import json_text
from unidiff_sdk.errors import CheckpointError

__all__ = ["read_json", "write_json"]


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file cannot be read or holds something else."""
    try:
        content = json_values.read_json(file, error=CheckpointError, kind=object, nan=True)
    except CheckpointError as error:
        raise CheckpointError(f"Cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a JSON {type(content).__name__}, but must hold an object.")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object with sorted keys, readable by people."""
    file.write_text(json_text(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
