"""The bundle on disk: the layout of a diffusers ONNX pipeline, hashed, and put in place in one step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from unidiff_sdk.errors import ExportError
from unidiff_sdk.inference.manifest import GRAPH_FILE, MANIFEST, file_sha256

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

# A protobuf file ends at 2 GB; past this, weights go beside the graph and are mapped into memory.
LARGEST_SINGLE_FILE = 1_500_000_000
EXTERNAL_WEIGHT = 1024

ORIGIN_KEYS = ("_name_or_path", "is_local", "local_files_only")


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write in, and rename it to `out` if the block ends well.

    Whatever ends the block early, Ctrl-C included, removes the sibling and leaves `out` as it was. Raises ExportError
    if `out` exists and `overwrite` is false, or if it holds something that is not a bundle.
    """
    _check_replaceable(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir()
        yield partial
        _check_replaceable(out, overwrite=overwrite)  # once more: an export takes minutes
        _swap(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise ExportError(f"{out} exists already: choose another output folder, or pass --overwrite to replace it")
    replaceable = out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    if not replaceable or out.is_symlink():
        raise ExportError(f"{out} is not a bundle, so it is not replaced: choose another output folder")


def _swap(new: Path, out: Path) -> None:
    """Rename `new` to `out`; a bundle already there is removed only once the new one has its place."""
    if not out.exists():
        new.rename(out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    try:
        new.rename(out)
    except BaseException:
        old.rename(out)
        raise
    shutil.rmtree(old)


def write_graph(model: ir.Model, folder: Path, config: Mapping[str, Any]) -> Path:
    """Save `model` as folder/model.onnx with the config.json that optimum's loader asks for, and check the file."""
    import onnx

    folder.mkdir(exist_ok=True)
    for old in graph_files(folder):
        old.unlink()  # not written over: a session may still have it mapped
    file = folder / GRAPH_FILE
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights > LARGEST_SINGLE_FILE:
        ir.save(model, file, external_data=f"{GRAPH_FILE}_data", size_threshold_bytes=EXTERNAL_WEIGHT)
    else:
        ir.save(model, file)
    onnx.checker.check_model(str(file))
    write_json(folder / "config.json", config)
    return file


def rewrite_graph(folder: Path, rewrite: Callable[[ir.Model], bool]) -> bool:
    """Load the graph in `folder`, and if `rewrite` says that it changed it, write it anew; weights beside it stay."""
    import onnx

    file = folder / GRAPH_FILE
    model = ir.load(file)
    if not rewrite(model):
        return False
    file.unlink()  # not written over: a session may still have it mapped
    ir.save(model, file)
    onnx.checker.check_model(str(file))
    return True


def graph_files(folder: Path) -> list[Path]:
    """The graph in `folder`, and its weights where they lie beside it."""
    return sorted(folder.glob(f"{GRAPH_FILE}*"))


def write_pipeline_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write what surrounds the graphs: pipeline index, scheduler, tokenizer, image preprocessing."""
    checkpoint.scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(checkpoint.tokenizer, folder / "tokenizer")
    if not checkpoint.shared:
        write_tokenizer(clip_tokenizer(checkpoint), folder / "clip_tokenizer")
    checkpoint.image_processor.save_pretrained(folder / "image_encoder")
    write_json(folder / "model_index.json", pipeline_index(checkpoint))


def pipeline_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model_index.json by which diffusers and optimum find the parts of a Stable Diffusion pipeline."""
    import diffusers

    onnx_graph = ["diffusers", "OnnxRuntimeModel"]
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(checkpoint.scheduler).__name__],
        "text_encoder": onnx_graph,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": onnx_graph,
        "vae_decoder": onnx_graph,
        "vae_encoder": onnx_graph,
    }


def clip_tokenizer(checkpoint: Checkpoint) -> Any:
    """CLIP's own tokenizer: that of search, where prompts have another text encoder."""
    tokenizer, config = deepcopy(checkpoint.clip_tokenizer), checkpoint.clip.config.text_config
    if len(tokenizer) != config.vocab_size:
        raise ExportError(
            f"{checkpoint.path}: clip knows {config.vocab_size} tokens, but its tokenizer has {len(tokenizer)}: put "
            "vocab.json and merges.txt of the right one into clip/"
        )
    # What the tokenizer says of its length may be another model's, or missing: the tower decides.
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer with vocab.json and merges.txt, which transformers 5 no longer writes but others read."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))
    config = folder / "tokenizer_config.json"
    write_json(config, without_origin(json.loads(config.read_text(encoding="utf-8"))))


def plain_config(config: Any) -> dict[str, Any]:
    """A diffusers or transformers config as JSON values."""
    return without_origin(json.loads(config.to_json_string()))


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what the libraries note of the folder that they read: a path of this machine, useless on another."""
    return {key: value for key, value in config.items() if key not in ORIGIN_KEYS}


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every file under `folder` by its relative POSIX path, the manifest left out."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def write_json(file: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON; NaN and infinities are refused, since other readers refuse them."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def folder_size(folder: Path) -> int:
    """Bytes of all files under `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
