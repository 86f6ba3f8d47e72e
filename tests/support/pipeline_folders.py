"""Changes to the folders of pipelines and bundles, and a stand-in for their download."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def change_json(file: str, **changes: Any) -> Callable[[Path], None]:
    """A function that changes members of a JSON file in a folder."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def serve_from_hub(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a download of any repository copy the files of `folder` that are asked for into `cache`."""
    from huggingface_hub.utils import filter_repo_objects

    def snapshot(name: str, *, revision: str | None, **patterns: list[str]) -> str:
        files = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
        for file in filter_repo_objects(files, **patterns):
            (cache / file).parent.mkdir(exist_ok=True)
            shutil.copy(folder / file, cache / file)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
