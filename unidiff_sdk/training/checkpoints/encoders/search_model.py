"""A search model: a CLIP without a generator, from a transformers folder or an OpenCLIP model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import CLIPModel, CLIPTokenizer

from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training.checkpoints.bases import hub_id, local_folder
from unidiff_sdk.training.checkpoints.checkpoint import METADATA, ImageProcessor, load_clip, load_tokenizer
from unidiff_sdk.training.checkpoints.json_files import read_json

from .image_preprocessing import normalization, preprocessing_refusal
from .open_clip import PREFIX, load_open_clip, open_clip_tokenizer

__all__ = ["SearchModel", "load_search_model"]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(frozen=True)
class SearchModel:
    """The encoders of texts and images, on the CPU, in float32 and in eval mode.

    Attributes:
        path: Folder or file that the model was loaded from.
        clip: Both encoders.
        tokenizer: Its length is that of the text encoder.
        image_processor: Image preprocessing.
        meta: Content of unidiff.json if the model is part of a checkpoint, and the names of the base.
        folder: Folder that transformers loads. None for a converted model.
        variant: Variant of its weight files that was asked for.
    """

    path: Path
    clip: CLIPModel
    tokenizer: Any
    image_processor: Any
    meta: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    variant: str | None = None

    @property
    def name(self) -> str:
        """Name in the metadata, or of the folder."""
        return str(self.meta.get("name", self.path.name))

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square that the image encoder takes."""
        return int(self.clip.config.vision_config.image_size)

    @property
    def normalization(self) -> tuple[Any, Any]:
        """(mean, standard deviation) of each RGB channel by which pixels in [0, 1] are normalized."""
        return normalization(self.image_processor)

    @property
    def fit(self) -> Fit:
        """How images become squares: "pad" if it was trained so, else "crop"."""
        return "pad" if self.meta.get("fit") == "pad" else "crop"


def load_search_model(clip: str | Path, variant: str | None = None) -> SearchModel:
    """Load a CLIP without a generator.

    Args:
        clip: A transformers CLIP as a folder or "hf:org/name", or an OpenCLIP model (see `open_clip`). The folder
            clip/ of a checkpoint is one, too.
        variant: Variant of the weight files of a folder, such as "fp16".

    Raises:
        CheckpointError: It is missing, incomplete, of an unsupported architecture, or has no tokenizer that fits.
    """
    if str(clip).startswith(PREFIX):
        if variant is not None:
            raise CheckpointError(f"{clip} has no variants. Name the weight file in {PREFIX}ARCHITECTURE/FILE instead.")
        model = _from_open_clip(str(clip))
    else:
        model = _from_folder(local_folder(clip, ["*"], variant), variant, hub_id(clip))
    config = model.clip.config.text_config
    if len(model.tokenizer) != config.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {clip} has {len(model.tokenizer):,} tokens, but the text encoder embeds "
            f"{config.vocab_size:,}. Put the tokenizer files that were published with the model next to it."
        )
    # The length in the tokenizer's own configuration may be missing or wrong; the text encoder defines it.
    model.tokenizer.model_max_length = config.max_position_embeddings
    if refused := preprocessing_refusal(model.image_processor, model.image_size):
        raise CheckpointError(f"{clip}: {refused}")
    return model


def _from_folder(folder: Path, variant: str | None, hub: str | None) -> SearchModel:
    clip, image_processor = load_clip(folder, variant)
    meta: dict[str, Any] = {}
    if folder.name == "clip" and (folder.parent / METADATA).is_file():  # of a checkpoint
        meta = read_json(folder.parent / METADATA)
    if hub is not None:
        meta = {"name": hub, "base_model": [hub]} | meta
    return SearchModel(folder, clip, _tokenizer(folder), image_processor, meta, folder, variant)


def _from_open_clip(name: str) -> SearchModel:
    converted = load_open_clip(name)
    size = converted.image_size
    processor = ImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=converted.mean,
        image_std=converted.std,
    )
    path = Path(name.removeprefix(PREFIX))
    tokenizer = _tokenizer(path) if path.is_dir() else open_clip_tokenizer()
    return SearchModel(path, converted.clip, tokenizer, processor, {"name": name} if not path.exists() else {})


def _tokenizer(folder: Path) -> CLIPTokenizer:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Copy vocab.json, merges.txt and "
            "tokenizer_config.json from where the model was published."
        )
    return load_tokenizer(folder)
