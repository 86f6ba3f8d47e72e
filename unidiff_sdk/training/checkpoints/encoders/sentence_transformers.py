"""Folders of sentence-transformers that hold a CLIP of transformers."""

from __future__ import annotations

from pathlib import Path

from unidiff_sdk._internal.files import is_plain_path
from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk.errors import CheckpointError

__all__ = ["MODULES", "clip_folder"]

MODULES = "modules.json"
CLIP_MODULE, NORMALIZE = "CLIPModel", "Normalize"  # the latter has no effect: embeddings are unit vectors in any case


def clip_folder(folder: Path) -> Path:
    """The folder of the CLIP that `modules.json` names; the folder itself without that file.

    Raises CheckpointError if the modules are others, such as a text model of its own or a dense layer.
    """
    file = folder / MODULES
    if not file.is_file():
        return folder
    modules = read_json(file, error=CheckpointError, kind=list)
    if not all(isinstance(module, dict) and isinstance(module.get("type"), str) for module in modules):
        raise CheckpointError(f"{file} is not a list of modules of sentence-transformers.")
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    if kinds[:1] != [CLIP_MODULE] or set(kinds[1:]) - {NORMALIZE}:
        raise CheckpointError(
            f"{file} lists the modules {', '.join(kinds)[:200]}, but only {CLIP_MODULE} can be exported, with or "
            f"without {NORMALIZE}. Use a model that sentence-transformers loads as one CLIP."
        )
    path = modules[0].get("path", "")
    if not isinstance(path, str) or (path and not is_plain_path(path)):
        raise CheckpointError(f"{file} names the folder {path!r:.100}, which is not a plain path inside {folder}.")
    return folder / path if path else folder
