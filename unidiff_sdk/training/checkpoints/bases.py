"""Bases that fine-tuning starts from: a checkpoint, or a Stable Diffusion pipeline combined with a CLIP model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from unidiff_sdk._internal.files import checked_path, folder_hint
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.folder.hub import HUB_PREFIX, HubName, download_files, is_hub_name

from .architectures import check_tokenizer, require_files, require_generator
from .checkpoint import Checkpoint, assemble_checkpoint, load_checkpoint, load_clip, require_supported
from .encoders.open_clip import PREFIX, load_open_clip
from .json_files import read_json
from .loading.models import from_pretrained
from .loading.options import BaseOptions, is_single_file, require_safetensors
from .loading.single_file import SD15, config_folder

__all__ = ["hub_id", "load_base", "local_folder"]

PARTS = (
    *("unet", "transformer", "vae", "scheduler"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"),
)
PIPELINE_FILES = [f"{part}/*" for part in PARTS]
# Repositories hold the same weights several times. One float copy is enough, and pickles are never read.
IGNORED_FILES = ["*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx*", "*openvino*"]
VARIANTS = ("fp16", "non_ema")  # ignored unless they are asked for
# The CLIP whose text tower a Stable Diffusion was trained with, by the width of its text encoder.
MATCHING_CLIP = {768: f"{HUB_PREFIX}openai/clip-vit-large-patch14", 1024: f"{PREFIX}ViT-H-14/laion2b_s32b_b79k"}


def load_base(base: str | Path, clip: str | Path | None = None, options: BaseOptions | None = None) -> Checkpoint:
    """Load the model that fine-tuning starts from, with the text layers shared that both text models have in common.

    The model hub is asked only for names that start with "hf:", for safetensors. Their ids become the checkpoint's name
    and "base_model" metadata.

    Args:
        base: "tiny"; a checkpoint folder; or a Stable Diffusion (1.x, 2.x, Turbo): a diffusers folder, "hf:org/name",
            optionally with "@revision", or one safetensors file in the original layout.
        clip: CLIP model for a base without one, or to replace the base's: a transformers CLIP as a folder or
            "hf:org/name", or an OpenCLIP model (see `open_clip`).
        options: Weight files to load, and what to add to the base.

    Raises:
        CheckpointError: Either is missing, incomplete or of an unsupported architecture, or an addition does not fit.
    """
    options = options or BaseOptions()
    options.check_for(base)
    if clip is None and (str(base) == "tiny" or os.path.isdir(os.path.join(base, "clip"))):
        return require_supported(load_checkpoint(base, options))
    source = _pipeline_source(base, options)
    if clip is None:
        hint = _matching_clip(config_folder(source, options))
        raise CheckpointError(f"{base} has no CLIP model. Name one with --clip{hint}.")
    if str(clip).startswith(PREFIX):
        model = load_open_clip(str(clip))
        checkpoint = assemble_checkpoint(source, model.clip, model.image_processor, options=options)
    else:
        clip_folder = local_folder(clip, ["*"])
        tokenizer = _tokenizer_of(clip_folder) if config_folder(source, options) == SD15 else None
        checkpoint = assemble_checkpoint(source, *load_clip(clip_folder), tokenizer, options)
        checkpoint = replace(checkpoint, clip_path=clip_folder)
    tokens, embedded = len(checkpoint.clip_tokenizer), int(checkpoint.clip.config.text_config.vocab_size)
    if tokens != embedded:
        raise CheckpointError(
            f"The tokenizer of {base} has {tokens:,} tokens, but {clip} embeds {embedded:,}. Choose a CLIP that was "
            "trained with this tokenizer."
        )
    if source.is_file():
        checkpoint = replace(checkpoint, meta={"name": source.stem} | checkpoint.meta)
    return require_supported(_with_hub_names(checkpoint, base, clip))


def _pipeline_source(base: str | Path, options: BaseOptions) -> Path:
    """The single file that a base is, or the folder of its pipeline."""
    if is_single_file(base):
        return require_safetensors(Path(base), "checkpoint")
    folder = local_folder(base, ["model_index.json", *PIPELINE_FILES], options.variant)
    require_generator(folder)
    if not (folder / "model_index.json").is_file() or (folder / "manifest.json").is_file():
        raise CheckpointError(
            f"{base} is neither a checkpoint nor a diffusers pipeline: it has no model_index.json and clip/."
            f"{folder_hint(folder)}"
        )
    return folder


def _tokenizer_of(clip: Path) -> Any:
    """The tokenizer in a CLIP folder, for the text encoder of Stable Diffusion 1."""
    require_files(clip, {"tokenizer_config.json": "tokenizer, which the built-in configuration does not have"})
    check_tokenizer(clip, read_json(SD15 / "text_encoder" / "config.json")["max_position_embeddings"])
    return from_pretrained(CLIPTokenizer, clip)


def _with_hub_names(checkpoint: Checkpoint, base: str | Path, clip: str | Path) -> Checkpoint:
    """Record the hub ids that a base was loaded from, as its folder in the cache has no telling name."""
    hub_ids = [name for source in (base, clip) if (name := hub_id(source))]
    if not hub_ids:
        return checkpoint
    named = {"name": hub_ids[0]} if str(base).startswith(HUB_PREFIX) else {}
    return replace(checkpoint, meta={"base_model": hub_ids} | named | checkpoint.meta)


def hub_id(source: str | Path) -> str | None:
    """The id of a model that is named as "hf:org/name", with or without a revision. None for a folder."""
    return HubName.parse(str(source), CheckpointError).id if is_hub_name(source) else None


def local_folder(source: str | Path, files: list[str], variant: str | None = None) -> Path:
    """The folder itself, or the folder of a hub repository's files, downloaded if they are not in the cache."""
    if not str(source).startswith(HUB_PREFIX):
        if not checked_path(source, CheckpointError).is_dir():
            raise CheckpointError(
                f"There is no checkpoint folder {source}. Name an existing folder, or write {HUB_PREFIX}org/name for a "
                "model on the hub."
            )
        return Path(source)
    others = [f"*.{other}{end}*" for other in VARIANTS if other != variant for end in (".", "-")]
    return download_files(str(source), files, IGNORED_FILES + others, CheckpointError)


def _matching_clip(folder: Path) -> str:
    """Hint naming the CLIP that fits the pipeline's text encoder, if it is known."""
    try:
        width = read_json(folder / "text_encoder" / "config.json")["hidden_size"]
    except (CheckpointError, KeyError):
        return ""
    return f", for example {MATCHING_CLIP[width]}, where its text encoder comes from" if width in MATCHING_CLIP else ""
