"""LoRA files merged into a Stable Diffusion pipeline by the loaders of diffusers.

diffusers only warns of tensors that it does not use. A LoRA for another model would then be merged in part, or not at
all. So the tensors are compared with the layers of the models before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from unidiff_sdk._internal.warnings import quiet_logging
from unidiff_sdk.errors import CheckpointError

from .options import Lora
from .peft_adapters import adapter_tensors

__all__ = ["changes_text_encoder", "load_lora", "low_rank_factors", "merge_loras"]

PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")  # of which a pipeline has some
DENOISERS = PARTS[:2]
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
ADAPTER = "lora"  # name of an adapter within peft
NAMED = 3  # keys that an error names


def merge_loras(pipeline: Any, loras: Sequence[Lora]) -> None:
    """Merge LoRAs into the denoiser and the text encoders of a pipeline: W + weight · (alpha / rank) · B A.

    Accepts files in the formats of diffusers, peft and kohya, and the adapter folders of peft. diffusers does not read
    those of kohya for Stable Diffusion 3.

    Raises:
        CheckpointError: A file cannot be read, or does not fit the models. The models are then unchanged.
    """
    for lora in loras:
        _check(pipeline, lora.file)
    for lora in loras:
        with _parser_errors(lora.file):
            load_lora(pipeline, lora, ADAPTER)
            pipeline.set_adapters([ADAPTER], [lora.weight])
            pipeline.fuse_lora(safe_fusing=True)
            pipeline.unload_lora_weights()


def load_lora(pipeline: Any, lora: Lora, name: str) -> None:
    """Load a LoRA into a pipeline as an adapter of that name, without merging it."""
    source = adapter_tensors(lora.file) if lora.file.is_dir() else str(lora.file)
    pipeline.load_lora_weights(source, adapter_name=name, use_safetensors=True, local_files_only=True)


def low_rank_factors(pipeline: Any, lora: Lora) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """The factors A and B of a LoRA for each layer that it changes, as diffusers and peft scale them.

    The change of a weight is B A, without the LoRA's own weight. The models stay unchanged.

    Raises:
        CheckpointError: The file cannot be read, or does not fit the models.
    """
    _check(pipeline, lora.file)
    factors: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with _parser_errors(lora.file):
        load_lora(pipeline, lora, ADAPTER)
        for model in filter(None, (getattr(pipeline, part, None) for part in PARTS)):
            for layer in model.modules():
                if hasattr(layer, "base_layer") and ADAPTER in layer.lora_A:
                    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER]
                    factors[layer.base_layer] = down.detach().float().clone(), up.detach().float().clone()
        pipeline.unload_lora_weights()
    return factors


@contextmanager
def _parser_errors(file: Path) -> Iterator[None]:
    """Convert what diffusers and peft raise to a CheckpointError. Their parsers raise any error."""
    with quiet_logging():
        try:
            yield
        except Exception as error:
            raise _refusal(file, str(error).strip().partition("\n")[0] or type(error).__name__) from error


def changes_text_encoder(lora: Lora) -> bool:
    """Whether a LoRA has tensors for the text encoder, or the first of two."""
    if lora.file.is_dir():
        return any(key.startswith("text_encoder.") for key in adapter_tensors(lora.file))
    names = ("text_encoder.", "lora_te_", "lora_te1_")
    with safe_open(lora.file, framework="pt") as file:
        return any(key.startswith(names) for key in file.keys())  # noqa: SIM118 (no mapping)


# --- does it fit? ----------------------------------------------------------------------------------------------------


def _check(pipeline: Any, file: Path) -> None:
    """Raise CheckpointError unless every tensor of a LoRA belongs to a layer of the pipeline and has its shape."""
    tensors = _tensors(file)
    if not tensors:
        raise _refusal(file, "it holds no tensor")
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise _refusal(file, f"it holds values that are not finite: {_first(broken)}")
    if dora := [key for key in tensors if "dora_scale" in key or "lora_magnitude_vector" in key]:
        raise _refusal(file, f"it is a DoRA, which is not supported: {_first(dora)}")
    matrices = _converted(pipeline, file, tensors)
    expected = {part: dict(model.named_modules()) for part in PARTS if (model := getattr(pipeline, part, None))}
    problems = [problem for key, tensor in matrices.items() if (problem := _problem(key, tensor, matrices, expected))]
    if problems:
        raise _refusal(file, f"{len(problems)} of its {len(matrices)} tensors do not fit: {_first(problems)}")


def _tensors(file: Path) -> dict[str, Tensor]:
    if file.is_dir():
        return adapter_tensors(file)
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _refusal(file, f"it cannot be read ({error})") from error


def _converted(pipeline: Any, file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that peft gives them, as diffusers converts them: PART.LAYER.lora_A.weight."""
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    with quiet_logging():
        try:
            if hasattr(pipeline, "transformer"):
                named, alphas = pipeline.lora_state_dict(dict(tensors)), None
            else:
                # Trainers of Stable Diffusion XL number its blocks in another way, which depends on the UNet.
                own = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "text_encoder_2") else {}
                named, alphas = pipeline.lora_state_dict(dict(tensors), **own)
        except Exception as error:  # the parsers of diffusers raise any error
            raise _refusal(file, f"diffusers does not know its format: {str(error).strip():.300}") from error
    if any(key.startswith(KOHYA) for key in named):
        mixed = [key for key in tensors if not key.startswith(KOHYA)]
        reason = f"its keys are of several formats: {_first(mixed)}"
        raise _refusal(file, reason if mixed else "diffusers does not read the format of kohya for this model")
    scalars = [key for key in tensors if key.endswith(".alpha")] if alphas else []
    if len(named) + len(scalars) != len(tensors):
        raise _refusal(file, f"several of its {len(tensors)} keys have the same meaning: {_first(list(tensors))}")
    converted = {key: tensor for key, tensor in named.items() if key.partition(".")[0] not in PARTS}
    for part in PARTS:
        own = {key.removeprefix(f"{part}."): tensor for key, tensor in named.items() if key.startswith(f"{part}.")}
        if not own:
            continue
        try:
            if part in DENOISERS:
                own = own if "lora_A" in next(iter(own)) else convert_unet_state_dict_to_peft(own)
            else:
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
                if not hasattr(getattr(pipeline, part, None), "text_model"):
                    own = {key.removeprefix("text_model."): tensor for key, tensor in own.items()}
        except ValueError as error:
            raise _refusal(file, f"diffusers does not know the format of {_first(list(own))}") from error
        converted |= {f"{part}.{key}": tensor for key, tensor in own.items()}
    return converted


def _problem(
    key: str, tensor: Tensor, matrices: Mapping[str, Tensor], models: Mapping[str, Mapping[str, nn.Module]]
) -> str | None:
    """Why a tensor does not fit the models; None if it does."""
    part, _, name = key.partition(".")
    layer, _, kind = name.rpartition(".lora_")
    other = {"A.weight": "B.weight", "B.weight": "A.weight"}.get(kind)
    module = models.get(part, {}).get(layer)
    if other is None or not isinstance(module, nn.Linear | nn.Conv2d):
        return f"{key} (no such layer)"
    partner = matrices.get(f"{part}.{layer}.lora_{other}")
    if partner is None:
        return f"{key} (without lora_{other})"
    down, up = (tensor, partner) if kind[0] == "A" else (partner, tensor)
    out_size, in_size, *kernel = module.weight.shape
    rank = len(down)
    if down.shape != (rank, in_size, *kernel) or up.shape != (out_size, rank, *(1 for _ in kernel)):
        have = " and ".join(str(list(matrix.shape)) for matrix in (down, up))
        return f"{key} (matrices of shape {have} for a layer of shape {list(module.weight.shape)})"
    return None


def _first(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(f"{key:.160}" for key in keys[:NAMED]) + more


def _refusal(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The LoRA {file} does not fit the base: {reason}. Nothing was merged. Use a LoRA in the format of diffusers, "
        "peft or kohya that was trained for this Stable Diffusion."
    )
