"""Which models are supported: their configuration files are checked before any weight is read.

The libraries load a model of another class without its other parts, or fail with a message about tensors. So what each
file states that it is comes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.files import folder_hint
from unidiff_sdk.errors import BundleError, CheckpointError
from unidiff_sdk.inference.folder.diffusers_folder import refusal
from unidiff_sdk.inference.schedule import FOLLOWED_SCHEDULERS, Schedule, scheduler_refusal

from .json_files import read_json
from .loading.second_text_encoder import has_second_text_encoder, pooled_width

__all__ = [
    "MAX_SIZE",
    "METADATA",
    "check_classes",
    "check_clip_files",
    "check_config",
    "check_pipeline_files",
    "check_tokenizer",
    "has_generator",
    "model_type_of",
    "require_files",
    "require_generator",
]

METADATA = "unidiff.json"
MAX_LAYERS = 1_000  # in the configuration of a model: layers, or layers of a block
MAX_SIZE = 10_000_000  # any other integer there: widths, tokens, timesteps

ADVICE = "use a model with the architecture of Stable Diffusion 1, 2, XL or 3"
CLIP_ADVICE = "use a CLIP model, which transformers' CLIPModel and CLIPProcessor load"
# For each file: the field that names a class, and the names that are supported.
PIPELINE_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unet/config.json": ("_class_name", ("UNet2DConditionModel",)),
    "vae/config.json": ("_class_name", ("AutoencoderKL",)),
    "text_encoder/config.json": ("model_type", ("clip_text_model", "clip")),
    "text_encoder_2/config.json": ("model_type", ("clip_text_model",)),
    "tokenizer/tokenizer_config.json": ("tokenizer_class", ("CLIPTokenizer", "CLIPTokenizerFast")),
    "tokenizer_2/tokenizer_config.json": ("tokenizer_class", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
CLIP_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "config.json": ("model_type", ("clip",)),
    "tokenizer_config.json": ("tokenizer_class", ("CLIPTokenizer", "CLIPTokenizerFast")),
}
ENCODERS = ("clip", "siglip", "siglip2")
PREPROCESSOR = "preprocessor_config.json"
# BitImageProcessor has the steps and the defaults of CLIP's.
PREPROCESSORS = (
    "CLIPFeatureExtractor",
    "CLIPImageProcessor",
    "CLIPImageProcessorFast",
    "CLIPImageProcessorPil",
    "BitImageProcessor",
    "BitImageProcessorFast",
    "BitImageProcessorPil",
)


def require_files(folder: Path, files: Mapping[str, str]) -> None:
    """Check that a folder holds files, by name and content. Raises CheckpointError that lists the missing ones."""
    if not folder.is_dir():
        raise CheckpointError(f'There is no checkpoint folder {folder}. Name an existing folder, or use "tiny".')
    missing = [f"{name} ({content})" for name, content in files.items() if not (folder / name).is_file()]
    if missing and (hint := folder_hint(folder)) and not (folder / METADATA).is_file() and len(missing) > 2:
        raise CheckpointError(f"{folder} is not a checkpoint.{hint}")
    if missing:
        raise CheckpointError(f"{folder} is not a complete checkpoint. Missing: {', '.join(missing)}.")


def has_generator(folder: Path) -> bool:
    """Whether a folder is laid out as a pipeline or a checkpoint, and not as a CLIP or SigLIP alone."""
    encoders = (folder / "config.json").is_file() or (folder / "modules.json").is_file()
    return not encoders or (folder / "model_index.json").is_file() or (folder / "clip").is_dir()


def require_generator(folder: Path) -> None:
    """Raise CheckpointError if a folder holds a CLIP or SigLIP alone."""
    if not has_generator(folder):
        raise CheckpointError(
            f"{folder} has no generator. If it is a CLIP or SigLIP, train it with unidiff-train DATA --base {folder} "
            f"--is 0, and export it with unidiff-export --clip {folder}."
        )


def check_pipeline_files(folder: Path) -> None:
    """Check the configuration files of a Stable Diffusion pipeline. Raises CheckpointError if it is another model."""
    check_classes(folder, PIPELINE_CLASSES, ADVICE)
    unet, vae, text = (read_json(folder / part / "config.json") for part in ("unet", "vae", "text_encoder"))
    is_xl = has_second_text_encoder(folder)
    second = read_json(folder / "text_encoder_2" / "config.json") if is_xl else {}
    width = _width(text, second)
    if refused := refusal(unet, vae, width, pooled_width(second) if is_xl else None):
        raise CheckpointError(f"{folder}: {refused}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if refused := scheduler_refusal(scheduler):
        raise CheckpointError(f"{folder}: {refused}")
    if is_xl and (refused := _clipping_refusal(scheduler)):
        raise CheckpointError(f"{folder}: {refused}")
    if scheduler.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"The UNet of {folder} predicts {scheduler['prediction_type']!r}. Training supports epsilon and "
            "v_prediction."
        )
    try:
        Schedule.from_config(scheduler)
    except BundleError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    positions = text.get("max_position_embeddings", 77)
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).is_dir():
            check_tokenizer(folder / name, positions)
    if is_xl and (other := second.get("max_position_embeddings", 77)) != positions:
        raise CheckpointError(f"{folder}: text_encoder/ has {positions} positions, but text_encoder_2/ has {other}.")


def _clipping_refusal(scheduler: Mapping[str, Any]) -> str | None:
    """Why a scheduler cannot generate with Stable Diffusion XL as diffusers does. None if it can.

    The pipelines of Stable Diffusion 1 and 2 switch off the clipping of samples; that of XL does not.
    """
    name = scheduler.get("_class_name")
    clips = scheduler.get("clip_sample", name in ("DDIMScheduler", "DDIMParallelScheduler"))
    if clips and FOLLOWED_SCHEDULERS.get(str(name)) in ("ddim", "lcm"):
        return (
            f"the scheduler {name} clips samples (clip_sample), which is meant for pixels and destroys the latents of "
            'Stable Diffusion XL; set "clip_sample" to false in scheduler/scheduler_config.json'
        )
    return None


def _width(text: Mapping[str, Any], second: Mapping[str, Any]) -> int | None:
    """The width of the token states of both text encoders."""
    widths = [config.get("hidden_size") for config in (text, second) if config]
    known = [width for width in widths if isinstance(width, int)]
    return sum(known) if len(known) == len(widths) else None


def model_type_of(folder: Path) -> str:
    """What a folder of encoders states that it is: one of ENCODERS. Raises CheckpointError if it is another."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json. Name the folder of a CLIP or SigLIP of transformers.")
    stated = read_json(folder / "config.json").get("model_type", "clip")
    if stated not in ENCODERS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model_type is {stated!r:.60}, but only {' and '.join(ENCODERS)} can be "
            "exported for search."
        )
    return str(stated)


def check_clip_files(folder: Path, *, preprocessing: bool = True) -> None:
    """Check the configuration files of a CLIP folder. Raises CheckpointError if it is another model.

    preprocessing: Whether images must be prepared by the steps of CLIP, as training needs it.
    """
    check_classes(folder, CLIP_CLASSES, CLIP_ADVICE)
    if not preprocessing or not (folder / PREPROCESSOR).is_file():
        return
    preprocessor = read_json(folder / PREPROCESSOR)
    name = preprocessor.get("image_processor_type", preprocessor.get("feature_extractor_type", PREPROCESSORS[0]))
    if name not in PREPROCESSORS:
        raise CheckpointError(
            f"{folder / PREPROCESSOR}: the image preprocessing {name!r} is not supported. It resizes or crops in "
            f"another way than CLIPImageProcessor; {CLIP_ADVICE}."
        )


def check_classes(folder: Path, classes: dict[str, tuple[str, tuple[str, ...]]], advice: str) -> None:
    """Check the classes that the files of a folder state: for each file the field, and the names that are supported.

    Raises CheckpointError, which ends with `advice`, for another class.
    """
    for name, (field, supported) in classes.items():
        if not (folder / name).is_file():
            continue
        stated = read_json(folder / name).get(field)
        if stated is not None and stated not in supported:
            raise CheckpointError(
                f"{folder / name}: {field} is {stated!r}, but only {' and '.join(supported)} can be loaded; {advice}."
            )


def check_tokenizer(folder: Path, positions: Any) -> None:
    """Check that diffusers' pipeline and the runtime pad prompts alike."""
    config = read_json(folder / "tokenizer_config.json")
    if config.get("padding_side", "right") != "right":
        raise CheckpointError(f"{folder} pads on the {config['padding_side']}, but CLIP reads prompts from the left.")
    length = config.get("model_max_length")
    if length != positions:
        raise CheckpointError(
            f"{folder}: model_max_length is {length}, but the text encoder has {positions} positions. Set "
            f"model_max_length in tokenizer_config.json to {positions}."
        )


def check_config(config: Any, file: Path, name: str = "") -> None:
    """Check the integers in the configuration of a model, as the libraries build any model that one describes.

    Raises:
        CheckpointError: one is beyond what a model has.
    """
    inner = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in inner:
        check_config(value, file, f"{name}.{key}" if name else str(key))
    largest = MAX_LAYERS if "layers" in name else MAX_SIZE
    if isinstance(config, int) and abs(config) > largest:
        raise CheckpointError(f"{file}: {name:.100} is {config!r:.60}; at most {largest:,} is accepted. Fix the file.")
