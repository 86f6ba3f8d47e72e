"""The weight files of a model folder: the main ones or a variant such as fp16, in one file or in shards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training.checkpoints.json_files import read_json

__all__ = [
    "CLIP_WEIGHTS",
    "DIFFUSERS_WEIGHTS",
    "PIPELINE_WEIGHTS",
    "SD3_WEIGHTS",
    "TRANSFORMERS_WEIGHTS",
    "VAE_WEIGHTS",
    "XL_WEIGHTS",
    "choose_variant",
    "variant_of",
]

DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
PIPELINE_WEIGHTS = {"unet": DIFFUSERS_WEIGHTS, "vae": DIFFUSERS_WEIGHTS, "text_encoder": TRANSFORMERS_WEIGHTS}
XL_WEIGHTS = PIPELINE_WEIGHTS | {"text_encoder_2": TRANSFORMERS_WEIGHTS}
SD3_WEIGHTS = {"transformer" if part == "unet" else part: weights for part, weights in XL_WEIGHTS.items()}
CLIP_WEIGHTS, VAE_WEIGHTS = {"": TRANSFORMERS_WEIGHTS}, {"": DIFFUSERS_WEIGHTS}  # of a folder that holds one model

SHARD = re.compile(r"[\w.-]+\.safetensors")
MAX_SHARDS = 1_000


def choose_variant(folder: Path, parts: Mapping[str, str], requested: str | None = None) -> str | None:
    """Return the variant of the weight files to load; None for the main files.

    As in diffusers, a part without the variant is loaded from its main file.

    Args:
        folder: Folder of the parts.
        parts: Name of the main weight file, by the subfolder of each part.
        requested: The variant that the user names. Default: the main files; where a part has none, its only variant.

    Raises:
        CheckpointError: A part has no safetensors, the requested variant does not exist, or there are several.
    """
    found = {part: _variants(folder / part, weights) for part, weights in parts.items()}
    for part, files in found.items():
        if not files:
            raise CheckpointError(
                f"{folder / part} has no {parts[part]}. Only safetensors are read; convert other weight formats first."
            )
        for file in files.values():
            _check_shards(file)
    known = sorted({variant for files in found.values() for variant in files if variant is not None})
    if requested is not None and requested not in known:
        raise CheckpointError(
            f"{folder} has no weights of the variant {requested!r}. Variants: {', '.join(known) or 'none'}."
        )
    lacking = {part: files for part, files in found.items() if None not in files and requested not in files}
    if requested is not None and lacking:
        part, files = next(iter(lacking.items()))
        raise CheckpointError(
            f"{folder / part} has weights neither of the variant {requested!r} nor as {parts[part]}, only of "
            f"{', '.join(map(str, files))}."
        )
    if requested is not None or not lacking:
        return requested
    common = sorted(set.intersection(*(set(map(str, files)) for files in lacking.values())))
    if len(common) != 1:
        raise CheckpointError(
            f"{folder} has its weights only as variants: {', '.join(known)}. Name the one to load with --variant."
            if common
            else f"{folder} has its weights in variants that its parts do not have in common: {', '.join(known)}."
        )
    return common[0]


def variant_of(folder: Path, weights: str, variant: str | None) -> str | None:
    """The variant if the folder has it; None, for the main weights, if not."""
    return variant if variant in _variants(folder, weights) else None


def _variants(folder: Path, weights: str) -> dict[str | None, Path]:
    """The weight file, or the index of the shards, of each variant in a folder. The main files are None."""
    stem, extension = weights.rsplit(".", 1)
    name = re.compile(rf"{re.escape(stem)}(?:\.(\w+))?\.{extension}")
    index = re.compile(rf"{re.escape(weights)}\.index(?:\.(\w+))?\.json")
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    matches = [(match[1], file) for file in files for kind in (index, name) if (match := kind.fullmatch(file.name))]
    return dict(matches)  # a single file is preferred to shards, as in diffusers: its name sorts before the index


def _check_shards(file: Path) -> None:
    """Check that the shards that an index names are safetensors next to it. Raises CheckpointError if not."""
    if file.suffix != ".json":
        return
    shards = read_json(file).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{file} has no weight_map from tensors to files. Download the file again.")
    names = sorted(set(shards.values()))
    for name in names[:MAX_SHARDS]:
        if not SHARD.fullmatch(name):
            raise CheckpointError(f"{file} names the shard {name!r:.100}; only safetensors next to it are read.")
        if not (file.parent / name).is_file():
            raise CheckpointError(f"{file.parent} lacks the shard {name}. Download it: {file.name} lists {len(names)}.")
    if len(names) > MAX_SHARDS:
        raise CheckpointError(f"{file} lists {len(names):,} shards; at most {MAX_SHARDS:,} are read.")
