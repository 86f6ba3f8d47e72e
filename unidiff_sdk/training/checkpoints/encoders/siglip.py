"""What is particular about a SigLIP folder: its configuration and its tokenizer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training.checkpoints.checkpoint import load_tokenizer
from unidiff_sdk.training.checkpoints.json_files import read_json

__all__ = ["check_siglip", "is_sentencepiece", "siglip_tokenizer"]

SENTENCEPIECE_CLASS = "SiglipTokenizer"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"


def check_siglip(folder: Path) -> None:
    """Check the configuration of a SigLIP before its weights are read.

    Raises CheckpointError if embeddings of texts and images cannot be compared, or images are not square.
    """
    config = read_json(folder / "config.json")
    text, vision = (_section(config, name, folder) for name in ("text_config", "vision_config"))
    width, text_width = vision.get("hidden_size", 768), text.get("hidden_size", 768)
    projected = text.get("projection_size") or text_width
    if projected != width:
        raise CheckpointError(
            f"{folder}: the text encoder returns {projected!r:.40} dimensions and the image encoder {width!r:.40}, so "
            "their embeddings cannot be compared. Use the model as it was published."
        )
    if not vision.get("vision_use_head", True):
        raise CheckpointError(f"{folder}: the image encoder has no pooling head (vision_use_head is false).")
    patches = vision.get("num_patches", 256)
    if not isinstance(patches, int) or patches < 1 or math.isqrt(patches) ** 2 != patches:
        raise CheckpointError(f"{folder}: num_patches is {patches!r:.60}, but positions must form a square.")
    if isinstance(vision.get("image_size", 224), bool) or not isinstance(vision.get("image_size", 224), int):
        raise CheckpointError(
            f"{folder}: image_size is {vision['image_size']!r:.60}; only models for square images are supported."
        )


def siglip_tokenizer(folder: Path) -> Any:
    """The tokenizer of a SigLIP folder, as transformers makes it of tokenizer.json.

    Raises CheckpointError without tokenizer.json: the runtime has no SentencePiece.
    """
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(
            f"{folder} has no {TOKENIZER}. A SentencePiece model alone is not read: copy {TOKENIZER} from where the "
            "model was published."
        )
    tokenizer = load_tokenizer(folder, PreTrainedTokenizerFast if is_sentencepiece(folder) else AutoTokenizer)
    if tokenizer.padding_side != "right":
        raise CheckpointError(
            f"{folder / TOKENIZER_CONFIG}: padding_side is {tokenizer.padding_side!r}, but texts are padded on the "
            'right. Set padding_side to "right", as the published SigLIP models do.'
        )
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{folder / TOKENIZER_CONFIG} names no pad_token. SigLIP pads texts to a fixed length.")
    return tokenizer


def is_sentencepiece(folder: Path) -> bool:
    """Whether transformers tokenizes with a SentencePiece model, and not with tokenizer.json."""
    config = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    return config.get("tokenizer_class", SENTENCEPIECE_CLASS) == SENTENCEPIECE_CLASS


def _section(config: dict[str, Any], name: str, folder: Path) -> dict[str, Any]:
    section = config.get(name)
    if not isinstance(section, dict):
        raise CheckpointError(f"{folder / 'config.json'} has no {name}.")
    return section
