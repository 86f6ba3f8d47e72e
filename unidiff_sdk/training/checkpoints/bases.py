"""Where fine-tuning starts: a checkpoint, or a Stable Diffusion and a CLIP that are brought together here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from unidiff_sdk.errors import CheckpointError

from .checkpoint import Checkpoint, ImageProcessor, assemble, load_checkpoint, load_clip, require_supported
from .open_clip import PREFIX, load_open_clip

__all__ = ["load_base"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PIPELINE_FILES = [f"{part}/*" for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")]
# Repositories hold the same weights several times; what is needed of them is one float copy, and nothing pickled.
NOT_NEEDED = ["*.bin", "*.ckpt", "*.pt", "*.msgpack", "*.h5", "*.onnx*", "*.fp16.*", "*.non_ema.*", "*openvino*"]
# The CLIP whose text tower a Stable Diffusion was trained with, by the width of its text encoder.
ITS_CLIP = {768: "openai/clip-vit-large-patch14", 1024: f"{PREFIX}ViT-H-14/laion2b_s32b_b79k"}


def load_base(base: str | Path, clip: str | Path | None = None) -> Checkpoint:
    """Open what fine-tuning starts from, its text layers shared as far as both models have them in common.

    base: "tiny"; a checkpoint folder; a diffusers Stable Diffusion (1.x, 2.x, Turbo) as a folder or hub id. clip: where
    the base has no CLIP beside it, or instead of it: a transformers CLIP as a folder or hub id, or an OpenCLIP model,
    see `openclip`. Only a hub id is ever downloaded, as safetensors.

    Raises CheckpointError where either is missing, incomplete or of another architecture.
    """
    if clip is None and (str(base) == "tiny" or (Path(base) / "clip").is_dir()):
        return require_supported(load_checkpoint(base))
    folder = _folder(base, ["model_index.json", *PIPELINE_FILES])
    if clip is None:
        raise CheckpointError(f"{base} has no CLIP beside it: name one with --clip{_hint(folder)}")
    if str(clip).startswith(PREFIX):
        model = load_open_clip(str(clip))
        checkpoint = assemble(folder, model.clip, _image_processor(model.image_size, model.mean, model.std))
    else:
        clip_folder = _folder(clip, ["*"])
        checkpoint = assemble(folder, *load_clip(clip_folder))
    words, known = len(checkpoint.clip_tokenizer), int(checkpoint.clip.config.text_config.vocab_size)
    if words != known:
        raise CheckpointError(f"{clip} knows {known:,} tokens, but the tokenizer has {words:,}: it needs another")
    return require_supported(checkpoint)


def _folder(source: str | Path, files: list[str]) -> Path:
    """The folder itself, or that of a hub repository's files, downloaded if they are not there yet."""
    if Path(source).is_dir() or not HUB_ID.fullmatch(str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=files, ignore_patterns=NOT_NEEDED))
    except Exception as error:  # whatever the hub's client and the network raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{source} is no folder, and cannot be had from the hub: {first_line}") from error


def _image_processor(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Any:
    return ImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=mean, image_std=std
    )


def _hint(folder: Path) -> str:
    """Which CLIP suits, where that is known."""
    try:
        width = json.loads((folder / "text_encoder" / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"; its text encoder comes from {ITS_CLIP[width]}" if width in ITS_CLIP else ""
