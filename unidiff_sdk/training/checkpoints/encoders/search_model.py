"""A search model: CLIP or SigLIP without a generator, of transformers, sentence-transformers or OpenCLIP.

SigLIP 2 has the architecture of SigLIP at a fixed resolution. Its NaFlex variants take images as lists of patches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import CLIPModel, Siglip2Model, SiglipModel

from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.folder.hub import is_hub_name
from unidiff_sdk.inference.manifest import ImageInput, Resize
from unidiff_sdk.training.checkpoints.architectures import check_clip_files, has_generator, model_type_of
from unidiff_sdk.training.checkpoints.bases import hub_id, load_base, local_folder
from unidiff_sdk.training.checkpoints.checkpoint import METADATA, Checkpoint, load_encoders, load_tokenizer
from unidiff_sdk.training.checkpoints.json_files import read_json
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions

from .image_preprocessing import image_input, image_processor_class, normalization, patch_input
from .open_clip import PREFIX, load_open_clip, open_clip_tokenizer
from .sentence_transformers import MODULES, clip_folder
from .siglip import check_siglip, siglip_tokenizer

__all__ = ["SearchModel", "TrainableModel", "load_search_model", "load_trainable"]

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
PREPROCESSOR = "preprocessor_config.json"
MODELS = {"clip": CLIPModel, "siglip": SiglipModel, "siglip2": Siglip2Model}
PROCESSORS = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}


@dataclass(frozen=True)
class SearchModel:
    """The encoders of texts and images, on the CPU, in float32 and in eval mode.

    Attributes:
        path: Folder or file that the model was loaded from.
        model: Both encoders.
        tokenizer: Its length is that of the text encoder.
        image_processor: Image preprocessing.
        meta: Content of unidiff.json if the model is part of a checkpoint, and the names of the base.
        folder: Folder that transformers loads. None for a converted model.
        variant: Variant of its weight files that was asked for.
    """

    path: Path
    model: CLIPModel | SiglipModel | Siglip2Model
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
    def is_siglip(self) -> bool:
        """Whether the model was trained with the sigmoid loss: it has a bias, no projection and no causal mask."""
        return isinstance(self.model, SiglipModel | Siglip2Model)

    @property
    def is_naflex(self) -> bool:
        """Whether it takes images of any aspect ratio as lists of patches."""
        return isinstance(self.model, Siglip2Model)

    @property
    def kind(self) -> str:
        """Family of the model."""
        return "SigLIP" if self.is_siglip else "CLIP"

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        config = self.model.config
        return int(config.vision_config.hidden_size if self.is_siglip else config.projection_dim)

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square that the image encoder takes; of a square image for a NaFlex one."""
        vision = self.model.config.vision_config
        if self.is_naflex:
            return int(vision.patch_size) * math.isqrt(int(self.image_processor.max_num_patches))
        return int(vision.image_size)

    @property
    def fit(self) -> Fit:
        """How images become squares: "pad" if it was trained so, else "crop"."""
        return "pad" if self.meta.get("fit") == "pad" else "crop"

    def image_input(self) -> ImageInput:
        """How an image becomes pixel values. Raises CheckpointError for a step that is not followed."""
        return self._image_input(self.fit)

    def _image_input(self, fit: Fit) -> ImageInput:
        try:
            if self.is_naflex:
                return patch_input(self.image_processor, int(self.model.config.vision_config.patch_size), fit)
            return image_input(self.image_processor, self.image_size, fit)
        except CheckpointError as error:
            raise CheckpointError(f"{self.path}: {error}") from None

    # --- What training needs of a model, under the names of `Checkpoint`

    @property
    def clip(self) -> Any:
        """Both encoders."""
        return self.model

    @property
    def clip_tokenizer(self) -> Any:
        """The tokenizer."""
        return self.tokenizer

    @property
    def normalization(self) -> tuple[Any, Any]:
        """(mean, standard deviation) of each RGB channel by which pixels in [0, 1] are normalized."""
        return normalization(self.image_processor)

    def resize_for(self, fit: Fit) -> Resize | None:
        """How images are resized before the crop. Raises CheckpointError if the model cannot be trained with `fit`."""
        return self._image_input(fit).resize

    def describe_sharing(self) -> str:
        """One line on the loss that trains the encoders."""
        loss = "the pairwise sigmoid loss" if self.is_siglip else "symmetric InfoNCE"
        return f"The base is a {self.kind} without a generator. Its encoders are trained by {loss}."


TrainableModel = Checkpoint | SearchModel


def load_trainable(base: str | Path, clip: str | Path | None, options: BaseOptions) -> TrainableModel:
    """Load what fine-tuning starts from: a base with a generator, or encoders without one.

    Args:
        base: See `load_base`, and `load_search_model` for a model without a generator.
        clip: CLIP model for a base with a generator.
        options: Weight files to load, and what to add to the base.

    Raises:
        CheckpointError: The base is missing or not supported, or an option does not fit it.
    """
    if clip is not None or not _is_search_model(base):
        return load_base(base, clip, options)
    if options != BaseOptions(variant=options.variant):
        raise CheckpointError(
            f"{base} has no generator, so LoRA files, textual inversions, another VAE and base_config do not fit it. "
            "Leave them out, or name a Stable Diffusion as the base."
        )
    model = load_search_model(base, options.variant)
    if model.is_naflex:
        raise CheckpointError(
            f"{base} is a NaFlex variant of SigLIP 2, which can be exported but not trained. Train a SigLIP 2 of a "
            "fixed resolution, such as siglip2-base-patch16-224."
        )
    return model


def _is_search_model(base: str | Path) -> bool:
    """Whether a base is a folder, a model of the hub or an OpenCLIP model with encoders alone."""
    if str(base).startswith(PREFIX):
        return True
    if is_hub_name(base):
        base = local_folder(base, ["model_index.json", "config.json", MODULES])
    return not has_generator(Path(base))


def load_search_model(source: str | Path, variant: str | None = None) -> SearchModel:
    """Load encoders without a generator.

    Args:
        source: A CLIP or SigLIP of transformers as a folder or "hf:org/name", a CLIP of sentence-transformers, or an
            OpenCLIP model (see `open_clip`). The folder clip/ of a checkpoint is one, too.
        variant: Variant of the weight files of a folder, such as "fp16".

    Raises:
        CheckpointError: It is missing, incomplete, of an unsupported architecture or preprocessing, or has no tokenizer
            that fits.
    """
    if not str(source).startswith(PREFIX):
        model = _from_folder(local_folder(source, ["*"], variant), variant, hub_id(source))
    elif variant is None:
        model = _from_open_clip(str(source))
    else:
        raise CheckpointError(f"{source} has no variants. Name the weight file in {PREFIX}ARCHITECTURE/FILE instead.")
    config = model.model.config.text_config
    tokens, embedded = len(model.tokenizer), config.vocab_size
    if tokens > embedded or (tokens < embedded and not model.is_siglip):  # SigLIP may embed unused tokens
        raise CheckpointError(
            f"The tokenizer of {source} has {tokens:,} tokens, but the text encoder embeds {embedded:,}. Put the "
            "tokenizer files that were published with the model next to it."
        )
    # The length in the tokenizer's own configuration may be missing or wrong; the text encoder defines it.
    model.tokenizer.model_max_length = config.max_position_embeddings
    model.image_input()  # raises for steps that are not followed
    return model


def _from_folder(source: Path, variant: str | None, hub: str | None) -> SearchModel:
    folder = clip_folder(source)
    stated = model_type_of(folder)
    is_siglip = stated != "clip"
    if is_siglip:
        check_siglip(folder)
    else:
        check_clip_files(folder, preprocessing=False)
    model, image_processor = load_encoders(folder, MODELS[stated], _processor_class(folder, stated), variant)
    meta: dict[str, Any] = {}
    if (folder / METADATA).is_file():  # trained without a generator
        meta = read_json(folder / METADATA)
    elif folder.name == "clip" and (folder.parent / METADATA).is_file():  # of a checkpoint
        meta = read_json(folder.parent / METADATA)
    elif folder != source:
        meta = {"name": source.name}
    if hub is not None:
        meta = {"name": hub, "base_model": [hub]} | meta
    tokenizer = siglip_tokenizer(folder) if is_siglip else _clip_tokenizer(folder)
    return SearchModel(source, model, tokenizer, image_processor, meta, folder, variant)


def _from_open_clip(name: str) -> SearchModel:
    converted = load_open_clip(name)
    path = Path(name.removeprefix(PREFIX))
    tokenizer = _clip_tokenizer(path) if path.is_dir() else open_clip_tokenizer()
    model = SearchModel(path, converted.clip, tokenizer, converted.image_processor)
    return model if path.exists() else replace(model, meta={"name": name})


def _processor_class(folder: Path, model_type: str) -> Any:
    """The class of the image processor that a folder names, or else that of its model."""
    stated = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    default = f"{PROCESSORS[model_type]}ImageProcessor"
    name = stated.get("image_processor_type", stated.get("feature_extractor_type", default))
    if (model_type == "siglip2") != str(name).startswith("Siglip2"):
        raise CheckpointError(f"{folder / PREPROCESSOR}: the image preprocessing {name!r:.60} is for another model.")
    try:
        return image_processor_class(str(name))
    except CheckpointError as error:
        raise CheckpointError(f"{folder / PREPROCESSOR}: {error}") from None


def _clip_tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}). Copy vocab.json, merges.txt and "
            "tokenizer_config.json from where the model was published."
        )
    return load_tokenizer(folder)
