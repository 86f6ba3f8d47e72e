"""The models of a pipeline folder, loaded in float32 by diffusers and transformers. What they leave out is an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import logging as transformers_logging

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.folder.diffusers_folder import native_size
from unidiff_sdk.training.checkpoints.architectures import check_config, require_files
from unidiff_sdk.training.checkpoints.json_files import read_json

from .options import BaseOptions
from .second_text_encoder import SecondTextEncoder, ThirdTextEncoder, zero_negative
from .single_file import load_parts_of_file, load_second_of_file, load_vae_file
from .weight_files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS, VAE_WEIGHTS, choose_variant, variant_of

__all__ = [
    "chosen_variant",
    "from_pretrained",
    "load_model",
    "load_parts",
    "load_second",
    "load_third",
    "load_transformer_parts",
    "progress_bars_hidden",
    "scheduler_class",
]

OTHER_FILES = ("modules.json",)  # of sentence-transformers; the libraries that are used here do not read it


def load_parts(
    source: Path, folder: Path, options: BaseOptions
) -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderKL]:
    """Load the UNet, the text encoder and the VAE of a pipeline, in float32 and eval mode.

    Args:
        source: The folder of the pipeline, or a single file.
        folder: Folder with the configuration files.
        options: The variant to load, and a VAE to use instead.

    Raises:
        CheckpointError: A part is missing, unreadable or incomplete.
    """
    if source.is_file():
        unet, text_encoder, vae = load_parts_of_file(source, folder, with_vae=options.vae is None)
    else:
        unet = _load_unet(folder / "unet", options.variant)
        text_encoder, vae = load_model(CLIPTextModel, folder / "text_encoder", options.variant), None
    return unet, text_encoder, vae or _load_vae(folder / "vae", options.variant, options.vae)


def load_transformer_parts(
    folder: Path, options: BaseOptions
) -> tuple[SD3Transformer2DModel, CLIPTextModelWithProjection, AutoencoderKL]:
    """Load the transformer, the first text encoder and the VAE of Stable Diffusion 3, as `load_parts` those of others.

    Raises:
        CheckpointError: A part is missing, unreadable or incomplete.
    """
    return (
        load_model(SD3Transformer2DModel, folder / "transformer", options.variant),
        load_model(CLIPTextModelWithProjection, folder / "text_encoder", options.variant),
        _load_vae(folder / "vae", options.variant, options.vae),
    )


def load_second(source: Path, folder: Path, options: BaseOptions) -> SecondTextEncoder:
    """Load the second text encoder of a pipeline, as `load_parts` loads the other models. Raises CheckpointError."""
    if source.is_file():
        model = load_second_of_file(source, folder)
    else:
        model = load_model(CLIPTextModelWithProjection, folder / "text_encoder_2", options.variant)
    tokenizer = from_pretrained(CLIPTokenizer, folder / "tokenizer_2")
    if (tokens := len(tokenizer)) > (embedded := model.config.vocab_size):
        raise CheckpointError(
            f"{folder / 'tokenizer_2'} has {tokens:,} tokens, but the text encoder embeds {embedded:,}."
        )
    return SecondTextEncoder(model, tokenizer, zero_negative(folder))


def load_third(folder: Path, options: BaseOptions) -> ThirdTextEncoder:
    """Load the third text encoder of a pipeline, as `load_parts` loads the other models. Raises CheckpointError."""
    model = load_model(T5EncoderModel, folder / "text_encoder_3", options.variant)
    tokenizer = from_pretrained(T5TokenizerFast, folder / "tokenizer_3")
    if (tokens := len(tokenizer)) > (embedded := model.config.vocab_size):
        raise CheckpointError(
            f"{folder / 'tokenizer_3'} has {tokens:,} tokens, but the text encoder embeds {embedded:,}."
        )
    return ThirdTextEncoder(model, tokenizer)


def load_model(model_class: Any, folder: Path, variant: str | None = None) -> Any:
    """Load a model in float32. Every tensor of the model must be in the file."""
    weights = DIFFUSERS_WEIGHTS if issubclass(model_class, diffusers.ModelMixin) else TRANSFORMERS_WEIGHTS
    model, info = from_pretrained(
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
    unet: UNet2DConditionModel = load_model(UNet2DConditionModel, folder, variant)
    unet.register_to_config(sample_size=native_size(read_json(folder / "config.json")))
    return unet


def _load_vae(folder: Path, variant: str | None, other: Path | None) -> AutoencoderKL:
    """Load the VAE in a folder of the base, or another that takes its place."""
    if other is None:
        vae: AutoencoderKL = load_model(AutoencoderKL, folder, variant)
        return vae
    if other.is_file():
        return load_vae_file(other, folder)
    require_files(other, {"config.json": "VAE"})
    own, others = read_json(folder / "config.json"), read_json(other / "config.json")
    if (found := others.get("_class_name", "AutoencoderKL")) != "AutoencoderKL":
        raise CheckpointError(f"{other} is {found!r}, but the VAE must be an AutoencoderKL.")
    for name, default in (("latent_channels", 4), ("block_out_channels", [64])):
        wanted, given = (_size(config.get(name, default)) for config in (own, others))
        if wanted != given:
            what = "latent channels" if name == "latent_channels" else "blocks"
            raise CheckpointError(f"The VAE {other} has {given} {what}, but that of the base has {wanted}.")
    vae = load_model(AutoencoderKL, other, chosen_variant(other, VAE_WEIGHTS))
    return vae


def chosen_variant(folder: Path, parts: Mapping[str, str], requested: str | None = None) -> str | None:
    """The variant of the weights to load, with a warning if it is not the main one and nobody asked for it."""
    variant = choose_variant(folder, parts, requested)
    if variant != requested:
        warn(f"{folder} has no main weight files. Its only variant {variant} is loaded, and converted to float32")
    return variant


def _size(value: Any) -> Any:
    return len(value) if isinstance(value, list) else value


def from_pretrained(loader: Any, folder: Path, **options: Any) -> Any:
    """`loader.from_pretrained` of a local folder. Raises CheckpointError for everything that the libraries raise."""
    for file in sorted(set(folder.glob("*.json")) - {folder / name for name in OTHER_FILES}):
        content = read_json(file)  # the libraries ask the hub for a model of that name where a file holds a string
        if file.name == "config.json":
            check_config(content, file)
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the libraries raise any error of their parsers
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"Cannot read {folder} as {loader.__name__}: {first_line}") from error


def scheduler_class(folder: Path) -> Any:
    """The class that the scheduler configuration of a pipeline folder names."""
    name = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    is_scheduler = isinstance(name, str) and name.endswith("Scheduler")
    found = getattr(diffusers, name, None) if is_scheduler else None
    if found is None:
        raise CheckpointError(f"{folder / 'scheduler'} names {name!r}, which the installed diffusers does not have.")
    return found


@contextmanager
def progress_bars_hidden() -> Iterator[None]:
    """Hide the progress bar that transformers shows for each model."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
