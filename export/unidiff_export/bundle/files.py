"""Write a bundle to disk: the layout of a diffusers ONNX pipeline, file hashes, and the atomic rename."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from transformers import CLIPTokenizer

from unidiff_sdk._internal.files import recover_folder, replacement_folder
from unidiff_sdk.errors import ExportError
from unidiff_sdk.inference.folder.signature import SIGNATURE
from unidiff_sdk.inference.manifest import GRAPH_FILE, MANIFEST, file_sha256
from unidiff_sdk.training.checkpoints.saving import save_scheduler

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

MODEL_CARD = "README.md"
# A protobuf file is limited to 2 GB. Larger weights are stored as external data, which ONNX Runtime maps into memory.
LARGEST_SINGLE_FILE = 1_500_000_000
MIN_EXTERNAL_BYTES = 1024

ORIGIN_KEYS = ("_name_or_path", "is_local", "local_files_only")


@contextmanager
def new_folder(out: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield a temporary sibling of `out`, and rename it to `out` when the block ends without an exception.

    After an exception, Ctrl-C included, the sibling is removed and `out` is unchanged.

    Raises:
        ExportError: `out` exists and `overwrite` is false, or `out` is not a bundle, or another export writes it.
    """
    recover_folder(out)  # a bundle that a killed export had set aside
    _check_replaceable(out, overwrite=overwrite)
    with replacement_folder(out, ExportError) as folder:
        yield folder
        _check_replaceable(out, overwrite=overwrite)  # again, because an export takes minutes


def _check_replaceable(out: Path, *, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise ExportError(
            f"{out} already exists. Choose another output folder, or pass --overwrite to replace the bundle."
        )
    replaceable = out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))
    if not replaceable or out.is_symlink():
        raise ExportError(f"{out} is not a bundle, so it is not overwritten. Choose another output folder.")


def write_graph(
    model: ir.Model, folder: Path, config: Mapping[str, Any], *, largest_single_file: int = LARGEST_SINGLE_FILE
) -> Path:
    """Save `model` as folder/model.onnx with the config.json that optimum reads, and check the file.

    Weights of more than `largest_single_file` bytes are stored as external data next to the graph.
    """
    import onnx

    folder.mkdir(exist_ok=True)
    for old in graph_files(folder):
        old.unlink()  # not overwritten, because a session may still map it
    file = folder / GRAPH_FILE
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights > largest_single_file:
        ir.save(model, file, external_data=f"{GRAPH_FILE}_data", size_threshold_bytes=MIN_EXTERNAL_BYTES)
    else:
        ir.save(model, file)
    onnx.checker.check_model(str(file))
    write_json(folder / "config.json", config)
    return file


def rewrite_graph(folder: Path, rewrite: Callable[[ir.Model], bool]) -> bool:
    """Load the graph in `folder`, and save it if `rewrite` changed it. External weights are not rewritten."""
    import onnx

    file = folder / GRAPH_FILE
    model = ir.load(file)
    if not rewrite(model):
        return False
    file.unlink()  # not overwritten, because a session may still map it
    ir.save(model, file)
    onnx.checker.check_model(str(file))
    return True


def graph_files(folder: Path) -> list[Path]:
    """Return the graph in `folder` and its external weights."""
    return sorted(folder.glob(f"{GRAPH_FILE}*"))


def write_pipeline_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the other files of a pipeline: index, scheduler, tokenizer, image preprocessing."""
    save_scheduler(checkpoint.scheduler, folder / "scheduler")
    write_tokenizer(checkpoint.tokenizer, folder / "tokenizer")
    if checkpoint.second is not None:
        write_tokenizer(checkpoint.second.tokenizer, folder / "tokenizer_2")
    if checkpoint.third is not None:
        write_tokenizer(checkpoint.third.tokenizer, folder / "tokenizer_3")
    if not checkpoint.shared:
        write_tokenizer(clip_tokenizer(checkpoint), folder / "clip_tokenizer")
    checkpoint.image_processor.save_pretrained(folder / "image_encoder")
    write_json(folder / "model_index.json", pipeline_index(checkpoint))


def pipeline_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the model_index.json that lists the parts of a Stable Diffusion pipeline for diffusers and optimum."""
    import diffusers

    onnx_graph = ["diffusers", "OnnxRuntimeModel"]
    second = checkpoint.second
    own: dict[str, Any] = {"requires_safety_checker": False, "safety_checker": [None, None]}
    if checkpoint.is_transformer:
        absent, third = [None, None], checkpoint.third
        own = {
            "image_encoder": absent,
            "text_encoder_2": onnx_graph,
            "text_encoder_3": absent if third is None else onnx_graph,
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "tokenizer_3": absent if third is None else ["transformers", type(third.tokenizer).__name__],
        }
    elif second is not None:
        own = {
            "force_zeros_for_empty_prompt": second.zero_negative,
            "text_encoder_2": onnx_graph,
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    return own | {
        "_class_name": f"StableDiffusion{_version(checkpoint)}Pipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", type(checkpoint.scheduler).__name__],
        "text_encoder": onnx_graph,
        "tokenizer": ["transformers", "CLIPTokenizer"],
        checkpoint.denoiser: onnx_graph,
        "vae_decoder": onnx_graph,
        "vae_encoder": onnx_graph,
    }


def _version(checkpoint: Checkpoint) -> str:
    """The part of the name of a pipeline that differs between versions of Stable Diffusion."""
    if checkpoint.is_transformer:
        return "3"
    return "" if checkpoint.second is None else "XL"


def clip_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return CLIP's own tokenizer, which search uses if prompts have another text encoder."""
    tokenizer, config = deepcopy(checkpoint.clip_tokenizer), checkpoint.clip.config.text_config
    if len(tokenizer) != config.vocab_size:
        raise ExportError(
            f"{checkpoint.path}: CLIP has a vocabulary of {config.vocab_size} tokens, but its tokenizer has "
            f"{len(tokenizer)}. Put the matching vocab.json and merges.txt into clip/."
        )
    # The length in the tokenizer's own configuration may be missing or wrong; the text tower defines it.
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save the tokenizer with vocab.json and merges.txt, which other tools read but transformers 5 does not write."""
    tokenizer.save_pretrained(folder)
    if isinstance(tokenizer, CLIPTokenizer):
        tokenizer.backend_tokenizer.model.save(str(folder))
    config = folder / "tokenizer_config.json"
    write_json(config, without_origin(json.loads(config.read_text(encoding="utf-8"))))


def plain_config(config: Any) -> dict[str, Any]:
    """Return a configuration of diffusers or transformers as JSON values."""
    return without_origin(json.loads(config.to_json_string()))


def without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the source folder that the libraries record: a path of this machine."""
    return {key: value for key, value in config.items() if key not in ORIGIN_KEYS}


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of the files under `folder`, by relative POSIX path, except manifest, signature, model card.

    The card is not part of the bundle's identity: a user may edit it.
    """
    unlisted = {folder / MANIFEST, folder / SIGNATURE, folder / MODEL_CARD}
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file not in unlisted)
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def write_json(file: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON. NaN and infinity raise ValueError, because JSON does not have them."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def folder_size(folder: Path) -> int:
    """Return the size of all files under `folder` in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
