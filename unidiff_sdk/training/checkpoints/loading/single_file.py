"""Models in one safetensors file, read by the loaders of diffusers with configuration files of this machine.

Single-file checkpoints have the names of the original repository (CompVis/latent-diffusion), and no configuration. A
folder states it: any diffusers pipeline with the same architecture, or the built-in one of Stable Diffusion 1.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from unidiff_sdk._internal.warnings import quiet_logging, warn
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.folder.diffusers_folder import native_size
from unidiff_sdk.inference.schedule import Schedule
from unidiff_sdk.training.checkpoints.architectures import check_config
from unidiff_sdk.training.checkpoints.json_files import read_json

from .options import BaseOptions

__all__ = ["SD15", "config_folder", "load_parts_of_file", "load_second_of_file", "load_vae_file"]

SD15 = Path(__file__).with_name("sd15")
"""The configuration of Stable Diffusion 1.5, without its tokenizer, which is CLIP's."""

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
XL_TEXT = ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.")
FIRST_CONVOLUTION = f"{UNET}input_blocks.0.0.weight"
# The layout of other models, by the start of a tensor's name.
OTHER_MODELS = {
    "conditioner.embedders.": "an SDXL checkpoint; name a folder with the configuration of SDXL with --base-config",
    f"{UNET}joint_blocks.": "a Stable Diffusion 3 checkpoint",
    f"{UNET}double_blocks.": "a FLUX checkpoint",
    "double_blocks.": "a FLUX checkpoint",
    "control_model.": "a ControlNet",
    "lora_": "a LoRA; merge it into a base with --lora",
    "down_blocks.": "a model in the layout of diffusers; put it into a pipeline folder",
}
EMA = "model_ema."
V_PREDICTION = ("v_pred", "ztsnr")  # empty tensors by which some trainers mark a file
SCHEDULE = "alphas_cumprod"
LARGEST_DIFFERENCE = 5e-3  # of alpha-bar in [0, 1], stored in half precision


def config_folder(source: Path, options: BaseOptions) -> Path:
    """The folder with the configuration files of a pipeline: its own, or for a single file the one that is named."""
    if not source.is_file():
        return source
    return options.base_config or SD15


def load_parts_of_file(
    file: Path, config: Path, *, with_vae: bool = True
) -> tuple[UNet2DConditionModel, CLIPTextModel, AutoencoderKL | None]:
    """Load the UNet, the text encoder and the VAE of a single-file checkpoint, in float32 and eval mode.

    Args:
        file: Safetensors file in the original layout of Stable Diffusion 1, 2 or XL. Its EMA weights are not read.
        config: Folder with the configuration files of a pipeline.
        with_vae: Whether to load the VAE.

    Raises:
        CheckpointError: The file cannot be read, is another model, or does not fit the configuration.
    """
    tensors = _read(file)
    _check_content(file, tensors, config, with_vae=with_vae)
    unet = _converted(file, "UNet", config, lambda: _from_file(UNet2DConditionModel, tensors, config, "unet"))
    unet.register_to_config(sample_size=native_size(read_json(config / "unet" / "config.json")))
    text_encoder = _converted(file, "text encoder", config, lambda: _text_encoder(tensors, config))
    if not with_vae:
        return unet, text_encoder, None
    return (
        unet,
        text_encoder,
        _converted(file, "VAE", config, lambda: _from_file(AutoencoderKL, tensors, config, "vae")),
    )


def load_second_of_file(file: Path, config: Path) -> CLIPTextModelWithProjection:
    """The second text encoder of a single-file checkpoint of Stable Diffusion XL, as `load_parts_of_file` loads it."""
    tensors = _read(file)

    def load() -> Any:
        return _text_encoder(tensors, config, CLIPTextModelWithProjection, "text_encoder_2")

    model: CLIPTextModelWithProjection = _converted(file, "second text encoder", config, load)
    return model


def load_vae_file(file: Path, config: Path) -> AutoencoderKL:
    """Load a VAE, in float32 and eval mode, from a file with the keys of diffusers or of the original repository.

    Args:
        file: A safetensors file.
        config: Folder with the config.json of a VAE of the same shape.

    Raises:
        CheckpointError: The file cannot be read, or does not hold the VAE that the configuration describes.
    """
    try:
        vae: Any = AutoencoderKL.from_single_file(str(file), config=str(config), local_files_only=True)
    except NotImplementedError as error:  # diffusers moves tensors that have no values
        raise CheckpointError(f"{file} lacks tensors of the VAE that {config} describes.") from error
    except Exception as error:  # the loaders raise any error of their parsers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{file} is not a VAE like the base's: {reason}") from error
    return vae.float().eval()  # type: ignore[no-any-return]


# --- what a file holds -----------------------------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"The checkpoint {file} cannot be read: {error}. Download it again.") from error


def _check_content(file: Path, tensors: Mapping[str, Tensor], config: Path, *, with_vae: bool) -> None:
    """Raise CheckpointError unless a file holds a Stable Diffusion that the configuration can describe."""
    is_xl = (config / "text_encoder_2").is_dir()
    for start, model in OTHER_MODELS.items():
        if any(name.startswith(start) for name in tensors) and not (is_xl and XL_TEXT[0].startswith(start)):
            raise CheckpointError(
                f"{file} is {model}. Single files of Stable Diffusion 1, 2 and XL can be read, in the original layout."
            )
    texts = {"text encoder": XL_TEXT[:1], "second text encoder": XL_TEXT[1:]} if is_xl else {"text encoder": (TEXT,)}
    parts = {"UNet": (UNET,), **texts, **({"VAE": (VAE, "vae.")} if with_vae else {})}
    lacking = [part for part, starts in parts.items() if not any(name.startswith(starts) for name in tensors)]
    if lacking:
        advice = " Name a VAE with --vae." if lacking == ["VAE"] else ""
        raise CheckpointError(
            f"{file} has no {' and no '.join(lacking)} in the original layout of Stable Diffusion: no tensor starts "
            f"with {' or '.join(parts[lacking[0]])}{advice}"
        )
    scheduler = read_json(config / "scheduler" / "scheduler_config.json")
    marked = [name for name in V_PREDICTION if name in tensors]
    if marked and scheduler.get("prediction_type") != "v_prediction":
        raise CheckpointError(
            f"{file} is marked as a model of v-prediction ({marked[0]}), but {config} states prediction_type "
            f"{scheduler.get('prediction_type', 'epsilon')!r}. Name the configuration of its base with --base-config."
        )
    _check_width(file, tensors, config)
    _check_schedule(file, tensors.get(SCHEDULE), scheduler, config)
    if any(name.startswith(EMA) for name in tensors):
        warn(f"{file} holds averaged weights (EMA) as well. They are not read")


def _check_width(file: Path, tensors: Mapping[str, Tensor], config: Path) -> None:
    """Check the inputs of the UNet, which differ between Stable Diffusion 1, 2 and the models derived from them."""
    unet = read_json(config / "unet" / "config.json")
    first = tensors.get(FIRST_CONVOLUTION)
    keys = next((tensor for name, tensor in tensors.items() if name.endswith("attn2.to_k.weight")), None)
    for what, tensor, setting in (
        ("input channels", first, "in_channels"),
        ("token states", keys, "cross_attention_dim"),
    ):
        if tensor is not None and tensor.ndim > 1 and tensor.shape[1] != unet.get(setting):
            raise CheckpointError(
                f"The UNet of {file} has {tensor.shape[1]} {what}, but {config} describes one with "
                f"{unet.get(setting)}. Stable Diffusion 1 has token states of width 768, 2 of 1024, and XL of 2048. "
                "Name a pipeline folder with the same architecture with --base-config."
            )


def _check_schedule(file: Path, stored: Tensor | None, scheduler: Mapping[str, Any], config: Path) -> None:
    """Check that a noise schedule in the file is that of the configuration."""
    if stored is None:
        return
    expected, found = Schedule.from_config(scheduler).alphas_cumprod, stored.double().numpy()
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=0, atol=LARGEST_DIFFERENCE):
        raise CheckpointError(
            f"The noise schedule in {file} ({SCHEDULE}) is not that of {config}. Name a pipeline folder with the "
            "scheduler of this model with --base-config."
        )


# --- conversion ------------------------------------------------------------------------------------------------------


def _converted(file: Path, part: str, config: Path, load: Callable[[], Any]) -> Any:
    """Call a loader of diffusers. Raises CheckpointError for everything that it raises."""
    try:
        with quiet_logging():
            model = load()
    except NotImplementedError as error:  # diffusers moves tensors that have no values
        raise CheckpointError(f"{file} lacks tensors of the {part} that {config} describes.") from error
    except CheckpointError:
        raise
    except Exception as error:  # the loaders raise any error of their parsers
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"The {part} of {file} does not fit the configuration {config}: {reason}") from error
    if missing := [name for name, tensor in model.state_dict().items() if tensor.is_meta]:
        raise CheckpointError(
            f"{file} lacks {len(missing)} tensors of the {part} that {config} describes, for example {missing[0]}."
        )
    return model.eval()


def _from_file(model_class: Any, tensors: Mapping[str, Tensor], config: Path, part: str) -> Any:
    check_config(read_json(config / part / "config.json"), config / part / "config.json")
    return model_class.from_single_file(
        dict(tensors), config=str(config), subfolder=part, torch_dtype=torch.float32, local_files_only=True
    )


def _text_encoder(
    tensors: Mapping[str, Tensor], config: Path, model_class: Any = CLIPTextModel, part: str = "text_encoder"
) -> Any:
    from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm

    file = config / part / "config.json"
    check_config(read_json(file), file)
    return create_diffusers_clip_model_from_ldm(
        model_class,
        dict(tensors),
        subfolder=part,
        config=str(config),
        torch_dtype=torch.float32,
        local_files_only=True,
    )
