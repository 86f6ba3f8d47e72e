"""A checkpoint: a Stable Diffusion pipeline folder with its CLIP, which diffusers and transformers load as it is.

    model_index.json  unet/ vae/ text_encoder/ tokenizer/ scheduler/    read by StableDiffusionPipeline
    clip/                                                               read by CLIPModel
    unidiff.json                                                        provenance: base, data, settings, losses
    README.md                                                           model card

Only safetensors are read. Nothing is unpickled or downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from unidiff_sdk._internal.files import checked_path, folder_hint
from unidiff_sdk._internal.images import Fit
from unidiff_sdk._internal.json_values import number_within
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.folder.diffusers_folder import native_size, refusal, sampler_defaults
from unidiff_sdk.inference.schedule import sampler_choice, scheduler_refusal, stated_settings

from .architectures import check_clip_files, check_pipeline_files
from .encoders.image_preprocessing import normalization, preprocessing_refusal
from .json_files import read_json
from .loading.additions import add_to_models
from .loading.options import BaseOptions
from .loading.single_file import load_vae_file
from .loading.weight_files import (
    CLIP_WEIGHTS,
    DIFFUSERS_WEIGHTS,
    PIPELINE_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    VAE_WEIGHTS,
    choose_variant,
    variant_of,
)
from .text_sharing import layers_of, share_text_layers, tower_of

__all__ = [
    "METADATA",
    "TINY",
    "Checkpoint",
    "ImageProcessor",
    "assemble_checkpoint",
    "load_checkpoint",
    "load_clip",
    "load_tokenizer",
    "require_supported",
]

TINY = Path(__file__).parents[1] / "recipes" / "tiny_checkpoint"
METADATA = "unidiff.json"

PIPELINE_FILES = {
    "model_index.json": "index of the diffusers pipeline",
    "unet/config.json": "UNet",
    "vae/config.json": "VAE",
    "text_encoder/config.json": "text encoder of the pipeline",
    "tokenizer/tokenizer_config.json": "tokenizer",
    "scheduler/scheduler_config.json": "noise scheduler",
}
CLIP_FILES = {
    "clip/config.json": "CLIP model",
    "clip/preprocessor_config.json": "image preprocessing of CLIP",
}

# The image processor without torchvision has another name in transformers 5. Version 4.57 has only one class.
ImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor

MAX_LAYERS = 1_000  # in the configuration of a model: layers, or layers of a block
MAX_SIZE = 10_000_000  # any other integer there: widths, tokens, timesteps


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one model, on the CPU, in float32 and in eval mode.

    Where `shared` is true, `text_encoder` and the text tower of `clip` are the same parameters.

    Attributes:
        path: Folder that the checkpoint was loaded from.
        clip_tokenizer: Tokenizer of CLIP; `tokenizer` is the pipeline's.
        image_processor: Image preprocessing of CLIP.
        meta: Content of unidiff.json. Empty for a folder without it.
        clip_path: Folder that CLIP was loaded from. None for a converted model.
        options: Files that the pipeline was loaded from, with the variant that was chosen, and what was added to it.
    """

    path: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    clip: CLIPModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    clip_tokenizer: CLIPTokenizer
    scheduler: Any
    image_processor: Any
    meta: dict[str, Any] = field(default_factory=dict)
    clip_path: Path | None = None
    options: BaseOptions = field(default_factory=BaseOptions)

    def parts(self) -> dict[str, Any]:
        """The keyword arguments of `save_checkpoint`, except `meta`."""
        names = ("unet", "vae", "clip", "text_encoder", "tokenizer", "clip_tokenizer", "scheduler", "image_processor")
        return {name: getattr(self, name) for name in names}

    @property
    def name(self) -> str:
        """Name in the metadata, or the folder's name."""
        return str(self.meta.get("name", self.path.name))

    @property
    def shared(self) -> bool:
        """Whether the pipeline's text encoder and CLIP's text tower are the same parameters."""
        return tower_of(self.text_encoder) is tower_of(self.clip.text_model)

    @property
    def shared_layers(self) -> int:
        """Number of text encoder layers, from the first, that are layers of CLIP's text tower."""
        return sum(a is b for a, b in zip(layers_of(self.text_encoder), layers_of(self.clip.text_model), strict=False))

    @property
    def conditioning_layer(self) -> int | None:
        """Index, from the end, of the CLIP text layer that conditions the UNet: -1 in SD 1.x, -2 in SD 2.x.

        None if the text encoder has layers, or a final norm, that CLIP's text tower does not have.
        """
        if self.shared:
            return -1
        ours, theirs = tower_of(self.text_encoder), tower_of(self.clip.text_model)
        if self.shared_layers < len(layers_of(ours)) or ours.final_layer_norm is not theirs.final_layer_norm:
            return None
        return self.shared_layers - len(layers_of(theirs)) - 1

    def describe_sharing(self) -> str:
        """One line on the layers that the UNet's text encoder and CLIP's text tower share."""
        ours, theirs = len(layers_of(self.text_encoder)), len(layers_of(self.clip.text_model))
        if not self.shared_layers:
            return "The text encoder and CLIP share no layer. Both are kept, and only pixels couple them."
        common = f"The text encoder shares {self.shared_layers} of its {ours} layers with CLIP ({theirs} layers)."
        if self.conditioning_layer is None:
            return f"{common} Both losses train the shared layers. The other layers stay separate."
        position = {-1: "the last layer", -2: "the second-to-last layer"}.get(
            self.conditioning_layer, f"layer {self.conditioning_layer} from the end"
        )
        return f"{common} Both losses train them, and {position} of CLIP conditions the UNet."

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of the scheduler as its file states it, with the name of its class."""
        return stated_settings(self.scheduler.config) | {"_class_name": type(self.scheduler).__name__}

    @property
    def sampler_defaults(self) -> dict[str, Any]:
        """name, steps and guidance_scale: those of the metadata, else those that the scheduler stands for."""
        return sampler_defaults(self.scheduler_config, self.meta.get("sampler"))

    @property
    def replaced_scheduler(self) -> str | None:
        """The scheduler that the default sampler stands in for, as the runtime does not have it. None if it has."""
        return None if "sampler" in self.meta else sampler_choice(self.scheduler_config).replaces

    @property
    def normalization(self) -> tuple[Any, Any]:
        """(mean, standard deviation) of each RGB channel by which CLIP's pixels in [0, 1] are normalized."""
        return normalization(self.image_processor)

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square images that the model generates."""
        return int(self.unet.config.sample_size) * self.latent_factor

    @property
    def fit(self) -> Fit:
        """How training made images square: "pad" if the metadata says so, else "crop"."""
        return "pad" if self.meta.get("fit") == "pad" else "crop"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_checkpoint(path: str | Path, options: BaseOptions | None = None) -> Checkpoint:
    """Load a checkpoint folder, or the built-in base by the name "tiny".

    Weights become float32, whatever precision is stored. Raises CheckpointError if a part is missing, unreadable or
    incomplete.
    """
    folder = TINY if str(path) == "tiny" else checked_path(path, CheckpointError)
    _require_files(folder, PIPELINE_FILES | CLIP_FILES)
    clip, image_processor = load_clip(folder / "clip")
    has_tokenizer = (folder / "clip" / "tokenizer_config.json").is_file()
    clip_tokenizer = _from_pretrained(CLIPTokenizer, folder / "clip") if has_tokenizer else None
    checkpoint = assemble_checkpoint(folder, clip, image_processor, clip_tokenizer, options)
    return replace(checkpoint, clip_path=folder / "clip")


def load_clip(folder: Path, variant: str | None = None) -> tuple[CLIPModel, Any]:
    """Load a transformers CLIP folder: the model, float32 in eval mode, and its image processor.

    variant: Variant of the weight file, such as "fp16". Raises CheckpointError if a part is missing, unreadable or
    incomplete.
    """
    _require_files(folder, {"config.json": "model", "preprocessor_config.json": "image preprocessing"})
    check_clip_files(folder)
    variant = _variant(folder, CLIP_WEIGHTS, variant)
    with _progress_bars_hidden():
        return _load_model(CLIPModel, folder, variant), _from_pretrained(ImageProcessor, folder)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the CLIP tokenizer in a folder. Raises CheckpointError if it cannot be read."""
    tokenizer: CLIPTokenizer = _from_pretrained(CLIPTokenizer, folder)
    return tokenizer


def assemble_checkpoint(
    folder: Path,
    clip: CLIPModel,
    image_processor: Any,
    clip_tokenizer: CLIPTokenizer | None = None,
    options: BaseOptions | None = None,
) -> Checkpoint:
    """Combine the Stable Diffusion pipeline in `folder` with a CLIP model, sharing their common text layers.

    clip_tokenizer: Default: the pipeline's. Raises CheckpointError if a part is missing, unreadable or incomplete, or
    if an addition of `options` does not fit.
    """
    _require_files(folder, PIPELINE_FILES)
    check_pipeline_files(folder)
    options = options or BaseOptions()
    variant = _variant(folder, PIPELINE_WEIGHTS, options.variant)
    with _progress_bars_hidden():
        tokenizer = _from_pretrained(CLIPTokenizer, folder / "tokenizer")
        embedded = read_json(folder / "text_encoder" / "config.json").get("vocab_size", len(tokenizer))
        embedded = int(number_within(f"vocab_size of {folder}", embedded, 1, MAX_SIZE, CheckpointError, whole=True))
        if len(tokenizer) > embedded:
            raise CheckpointError(
                f"The tokenizer of {folder} has {len(tokenizer):,} tokens, but its text encoder embeds {embedded:,}. "
                "Remove the added tokens, or save the text encoder with their embeddings."
            )
        unet = _load_unet(folder / "unet", variant)
        text_encoder = _load_model(CLIPTextModel, folder / "text_encoder", variant)
        add_to_models(unet, text_encoder, tokenizer, options)
        meta = read_json(folder / METADATA) if (folder / METADATA).exists() else {}
        return Checkpoint(
            path=folder,
            unet=unet,
            vae=_load_vae(folder / "vae", variant, options.vae),
            clip=clip,
            text_encoder=share_text_layers(text_encoder, clip),
            tokenizer=tokenizer,
            clip_tokenizer=clip_tokenizer or tokenizer,
            scheduler=_from_pretrained(_scheduler_class(folder), folder / "scheduler"),
            image_processor=image_processor,
            meta=options.recorded(meta),
            options=replace(options, variant=variant),
        )


def require_supported(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint itself. Raises CheckpointError if its UNet cannot be trained by the losses."""
    scheduler, width = checkpoint.scheduler.config, checkpoint.text_encoder.config.hidden_size
    if refused := refusal(checkpoint.unet.config, checkpoint.vae.config, width):
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    if refused := scheduler_refusal(checkpoint.scheduler_config):
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    if refused := preprocessing_refusal(checkpoint.image_processor, checkpoint.clip.config.vision_config.image_size):
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    if scheduler.prediction_type not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"The UNet of {checkpoint.path} predicts {scheduler.prediction_type!r}. Training supports epsilon and "
            "v_prediction."
        )
    return checkpoint


def _require_files(folder: Path, files: Mapping[str, str]) -> None:
    if not folder.is_dir():
        raise CheckpointError(f'There is no checkpoint folder {folder}. Name an existing folder, or use "tiny".')
    missing = [f"{name} ({content})" for name, content in files.items() if not (folder / name).is_file()]
    if missing and (hint := folder_hint(folder)) and not (folder / METADATA).is_file() and len(missing) > 2:
        raise CheckpointError(f"{folder} is not a checkpoint.{hint}")
    if missing:
        raise CheckpointError(f"{folder} is not a complete checkpoint. Missing: {', '.join(missing)}.")


def _variant(folder: Path, parts: Mapping[str, str], requested: str | None = None) -> str | None:
    """The variant of the weights to load, with a warning if it is not the main one and nobody asked for it."""
    variant = choose_variant(folder, parts, requested)
    if variant != requested:
        warn(f"{folder} has no main weight files. Its only variant {variant} is loaded, and converted to float32")
    return variant


def _load_model(model_class: Any, folder: Path, variant: str | None = None) -> Any:
    """Load a model in float32. Every tensor of the model must be in the file."""
    weights = DIFFUSERS_WEIGHTS if issubclass(model_class, diffusers.ModelMixin) else TRANSFORMERS_WEIGHTS
    model, info = _from_pretrained(
        model_class,
        folder,
        torch_dtype=torch.float32,
        use_safetensors=True,
        output_loading_info=True,
        variant=variant_of(folder, weights, variant),
    )
    # For such tensors the libraries only warn and leave random values.
    missing = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
    if missing or info.get("mismatched_keys"):
        wrong = [*missing, *map(str, info.get("mismatched_keys", []))]
        raise CheckpointError(
            f"{folder} lacks {len(wrong)} tensors of its model, or holds them in another shape, for example {wrong[0]}."
        )
    return model.eval()


def _load_unet(folder: Path, variant: str | None) -> UNet2DConditionModel:
    """Load a UNet, with the side of its latents as one number."""
    unet: UNet2DConditionModel = _load_model(UNet2DConditionModel, folder, variant)
    unet.register_to_config(sample_size=native_size(read_json(folder / "config.json")))
    return unet


def _load_vae(folder: Path, variant: str | None, other: Path | None) -> AutoencoderKL:
    """Load the VAE in a folder of the base, or another that takes its place."""
    if other is None:
        vae: AutoencoderKL = _load_model(AutoencoderKL, folder, variant)
        return vae
    if other.is_file():
        return load_vae_file(other, folder)
    _require_files(other, {"config.json": "VAE"})
    own, others = read_json(folder / "config.json"), read_json(other / "config.json")
    if (found := others.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise CheckpointError(f"{other} is {found!r}, but the VAE must be an AutoencoderKL.")
    for name, default in (("latent_channels", 4), ("block_out_channels", [64])):
        wanted, given = (_size(config.get(name, default)) for config in (own, others))
        if wanted != given:
            what = "latent channels" if name == "latent_channels" else "blocks"
            raise CheckpointError(f"The VAE {other} has {given} {what}, but that of the base has {wanted}.")
    vae = _load_model(AutoencoderKL, other, _variant(other, VAE_WEIGHTS))
    return vae


def _size(value: Any) -> Any:
    return len(value) if isinstance(value, list) else value


def _from_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)  # the libraries ask the hub for a model of that name where a file holds a string
        if file.name == "config.json":
            _check_sizes(content, file)
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise any error of their parsers
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"Cannot read {folder} as {loader.__name__}: {first_line}") from error


def _check_sizes(config: Any, file: Path, name: str = "") -> None:
    """Check the integers in the configuration of a model, as the libraries build any model that one describes.

    Raises:
        CheckpointError: one is beyond what a model has.
    """
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in inner:
        _check_sizes(value, file, f"{name}.{key}" if name else str(key))
    largest = MAX_LAYERS if "layers" in name else MAX_SIZE
    if isinstance(config, int) and abs(config) > largest:
        raise CheckpointError(f"{file}: {name:.100} is {config!r:.60}; at most {largest:,} is accepted. Fix the file.")


def _scheduler_class(folder: Path) -> Any:
    name = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    is_scheduler = isinstance(name, str) and name.endswith("Scheduler")
    scheduler_class = getattr(diffusers, name, None) if is_scheduler else None
    if scheduler_class is None:
        raise CheckpointError(f"{folder / 'scheduler'} names {name!r}, which the installed diffusers does not have.")
    return scheduler_class


@contextmanager
def _progress_bars_hidden() -> Iterator[None]:
    """Hide the progress bar that transformers shows for each model."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
