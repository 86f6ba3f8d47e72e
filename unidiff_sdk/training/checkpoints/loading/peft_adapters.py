"""LoRA adapters in the folders that peft writes: a configuration, and matrices without their scale.

adapter_config.json    adapter_model.safetensors                of one model
unet/…    text_encoder/…                                        several such folders, as peft's scripts write them
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training.checkpoints.json_files import read_json

__all__ = ["adapter_folders", "adapter_tensors"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<matrix>[AB])\.weight")
OF_SD3 = re.compile(r"base_model\.model\.transformer_blocks\.")  # those of a UNet are within its blocks
OF_CLIP = re.compile(r"(text_model\.)?encoder\.layers\.\d+\.")
# Settings with which the sum W + scale · B A is not the adapted layer, and the values with which it is.
REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "use_dora": (None, False),
}
CHANGED_BASES = ("pissa", "olora", "corda", "loftq")  # initializations that also change the weights of the base


def adapter_folders(folder: Path) -> list[Path]:
    """The folders of the adapters in `folder`. Raises CheckpointError if there is none, or one has no safetensors."""
    found = [each for each in (folder, *(folder / part for part in PARTS)) if (each / CONFIG).is_file()]
    if not found:
        raise CheckpointError(
            f"The LoRA {folder} is a folder without {CONFIG}. Name a safetensors file, or a folder that peft wrote."
        )
    for each in found:
        if not (each / WEIGHTS).is_file():
            raise CheckpointError(f"The LoRA folder {each} has no {WEIGHTS}. Only safetensors are read.")
    return found


def adapter_tensors(folder: Path) -> dict[str, Tensor]:
    """The matrices of the adapters in a folder, by the names of diffusers. Their scale is part of lora_B.

    Raises:
        CheckpointError: A file cannot be read, or an adapter is no plain LoRA.
    """
    tensors: dict[str, Tensor] = {}
    for each in adapter_folders(folder):
        config = read_json(each / CONFIG)
        _check(each, config)
        try:
            stored = load_file(each / WEIGHTS)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"The LoRA folder {each} cannot be read: {error}. Download it again.") from error
        tensors |= dict(_named(each, stored, config, None if each == folder else each.name))
    return tensors


def _check(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless an adapter is a plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"The adapter {folder} is {kind!r:.40}, which is not supported. Use a LoRA.")
    for name, accepted in REFUSED.items():
        if config.get(name) not in accepted:
            raise CheckpointError(
                f"The LoRA folder {folder} states {name} {config[name]!r:.60}, which is not supported."
            )
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(CHANGED_BASES):
        raise CheckpointError(
            f"The LoRA folder {folder} was trained with init_lora_weights {initial!r:.40}, which also changes the "
            "weights of the base. Convert it to a plain LoRA with peft first."
        )


def _named(
    folder: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any], part: str | None
) -> Iterator[tuple[str, Tensor]]:
    """Name the matrices of an adapter. Without a part, the names of the layers tell the models apart."""
    denoiser = "transformer" if any(map(OF_SD3.match, stored)) else "unet"
    for key, tensor in stored.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"The LoRA folder {folder} has the tensor {key:.160}, which is no matrix of a LoRA.")
        layer, matrix = match["layer"], match["matrix"]
        model = part or ("text_encoder" if OF_CLIP.match(layer) else denoiser)
        is_tower = model.startswith("text_encoder") and not layer.startswith("text_model.")
        name = f"text_model.{layer}" if is_tower else layer
        scaled = tensor * _scale(folder, layer, tensor.shape[1], config) if matrix == "B" else tensor
        yield f"{model}.{name}.lora_{matrix}.weight", scaled.contiguous()


def _scale(folder: Path, layer: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA, with the alpha of the layer."""
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
    alpha = config.get("lora_alpha") if alpha is None else alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise CheckpointError(f"The LoRA folder {folder} states lora_alpha {alpha!r:.60}; it must be a number.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
