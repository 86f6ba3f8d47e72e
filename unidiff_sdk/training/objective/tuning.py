"""Trainable weights: each component is tuned with all its weights, with low-rank adapters (LoRA), or not at all.

The components are the UNet (in Stable Diffusion 3 the transformer), the text side (CLIP's text tower and projection,
and the pipeline's CLIP text encoders as far as they are separate) and the image side (CLIP's image tower and
projection). Saved weights have the adapters merged, so a tuned checkpoint loads like any other. The adapters are saved
with it in the formats of peft, diffusers and kohya.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from unidiff_sdk._internal.warnings import quiet_logging
from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.checkpoints.encoders.search_model import SearchModel, TrainableModel
from unidiff_sdk.training.checkpoints.saving import plain_state_dict
from unidiff_sdk.training.config import Component, TrainingConfig
from unidiff_sdk.training.runtime.randomness import Purpose, derive_seed

from .encoder_model import EncoderModel

__all__ = ["ADAPTERS", "KOHYA", "add_adapters", "component_of", "save_adapters", "set_trainable"]

ADAPTERS = "adapters"  # subfolder of the checkpoint
KOHYA = "kohya.safetensors"  # file in that subfolder
# Attention, as in diffusers' LoRA training. The second line: of the text, in a transformer.
UNET_LAYERS = r"to_q|to_k|to_v|to_out\.0"
JOINT_LAYERS = r"add_q_proj|add_k_proj|add_v_proj|to_add_out"
TOWER_LAYERS = r"q_proj|k_proj|v_proj|out_proj|fc1|fc2"  # attention and MLP
FUSED_LAYERS = r"head\.attention\."  # SigLIP's pooling reads these weights itself, so an adapter would have no effect


def add_adapters(checkpoint: TrainableModel, config: TrainingConfig) -> None:
    """Insert low-rank adapters (Hu et al. 2021, "LoRA") into each component with a rank. They start as zero changes."""
    if not any(config.lora_rank(component) for component in Component):
        return
    torch.manual_seed(derive_seed(config.seed, Purpose.WEIGHTS))
    text, image = config.lora_rank(Component.TEXT), config.lora_rank(Component.IMAGE)
    shares_projection = isinstance(checkpoint, Checkpoint) and checkpoint.is_transformer and checkpoint.shared
    _inject(
        checkpoint.clip,
        {
            rf"text_model\..*\.({TOWER_LAYERS})|text_projection|text_model\.head": text,
            rf"vision_model\.(?!{FUSED_LAYERS}).*\.({TOWER_LAYERS})|visual_projection": image,
        },
    )
    if isinstance(checkpoint, SearchModel):
        return
    if shares_projection:  # the adapted one has taken its place in CLIP
        checkpoint.text_encoder.text_projection = checkpoint.clip.text_projection
    _inject(checkpoint.unet, {rf".*\.({UNET_LAYERS}|{JOINT_LAYERS})": config.lora_rank(Component.UNET)})
    # The layers shared with CLIP have adapters already.
    second = checkpoint.second
    ends_early = second is not None and not checkpoint.is_transformer  # see `unused_weights`
    used = checkpoint.text_encoder.config.num_hidden_layers - ends_early
    layers = range(checkpoint.shared_layers, used)
    own = "|".join(map(str, layers))
    _inject(checkpoint.text_encoder, {rf".*layers\.({own})\..*\.({TOWER_LAYERS})": text if own else 0})
    if second:
        _inject(second.model, {rf".*layers\.\d+\..*\.({TOWER_LAYERS})": text})


def set_trainable(model: EncoderModel, config: TrainingConfig) -> None:
    """Enable gradients for the weights to tune and disable them for all others.

    Raises OptionError if no weight is left to train.
    """
    unused = model.unused_weights()
    for name, parameter in model.named_parameters():
        component = component_of(name)
        if parameter in unused:
            parameter.requires_grad = False
        elif name.startswith("clip.logit_"):  # temperature and bias belong to texts and images alike
            parameter.requires_grad = config.trains_encoder and not config.locked >= {Component.TEXT, Component.IMAGE}
        elif component is None or component in config.locked:
            parameter.requires_grad = False
        else:
            parameter.requires_grad = not config.lora_rank(component) or ".lora_" in name
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError("There is nothing to train: all components that the active terms reach are locked.")


def component_of(name: str) -> Component | None:
    """Component of a parameter of the model. Temperature and bias belong to the text side.

    None for the frozen parts: the VAE and a third text encoder.
    """
    prefixes = {
        "unet.": Component.UNET,
        "text_encoder.": Component.TEXT,
        "text_encoder_2.": Component.TEXT,
        "clip.text_": Component.TEXT,
        "clip.logit_": Component.TEXT,
        "clip.vis": Component.IMAGE,
    }
    return next((component for prefix, component in prefixes.items() if name.startswith(prefix)), None)


def save_adapters(checkpoint: TrainableModel, folder: Path) -> None:
    """Write the adapters in up to three formats. Without adapters, nothing is written.

    - peft, one folder per model: `PeftModel.from_pretrained(base.unet, folder / "unet")`
    - diffusers, for UNet and text encoders: `StableDiffusionPipeline.load_lora_weights(folder)`, or the same of
      `StableDiffusionXLPipeline` or `StableDiffusion3Pipeline`
    - kohya, the same tensors with their alphas in one file, for other programs; not for Stable Diffusion 3, whose
      layers diffusers does not convert
    """
    if isinstance(checkpoint, SearchModel):
        _save_for_peft(checkpoint.model, folder / "clip")
        return
    _save_for_diffusers(checkpoint, folder)
    for name, model in (_prompted_models(checkpoint) | {"clip": checkpoint.clip}).items():
        _save_for_peft(model, folder / name)


def _save_for_diffusers(checkpoint: Checkpoint, folder: Path) -> None:
    models = _prompted_models(checkpoint)
    adapters = {name: tensors for name, model in models.items() if (tensors := _adapters(model))}
    if not adapters:
        return
    with quiet_logging():  # transformers reports a missing torchvision
        from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
    layers = {
        # Adapters of a transformer keep the names of peft, those of other models are older.
        f"{name}_lora_layers": tensors if name == "transformer" else convert_state_dict_to_diffusers(tensors)
        for name, tensors in adapters.items()
    }
    if checkpoint.is_transformer:
        StableDiffusion3Pipeline.save_lora_weights(folder, **layers)
        return
    pipeline: Any = StableDiffusionXLPipeline if checkpoint.second else StableDiffusionPipeline
    pipeline.save_lora_weights(folder, **layers)
    prefixed = {f"{name}.{key}": tensor for name, tensors in adapters.items() for key, tensor in tensors.items()}
    kohya: dict[str, Tensor] = convert_state_dict_to_kohya(prefixed)
    # diffusers numbers the text encoder as in models with two. Models with one call it "te".
    prefix = "lora_te1_" if checkpoint.second else "lora_te_"
    numbered = {key.replace("lora_te1_", prefix): tensor.contiguous() for key, tensor in kohya.items()}
    save_file(numbered, folder / KOHYA)


def _prompted_models(checkpoint: Checkpoint) -> dict[str, torch.nn.Module]:
    """The models that generate from prompts and can have adapters, by their names in a pipeline."""
    models: dict[str, torch.nn.Module] = {
        checkpoint.denoiser: checkpoint.unet,
        "text_encoder": checkpoint.text_encoder,
    }
    return models | ({"text_encoder_2": checkpoint.second.model} if checkpoint.second else {})


def _save_for_peft(model: Any, folder: Path) -> None:
    if not hasattr(model, "peft_config"):
        return
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = get_peft_model_state_dict(model, plain_state_dict(model))
    # A PeftModel holds the adapted model one level deeper.
    prefixed = {f"base_model.model.{key}": t.detach().cpu().contiguous() for key, t in tensors.items()}
    save_file(prefixed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(folder)


def _adapters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Adapter tensors under diffusers' names. The text encoder's names are shorter in transformers 5."""
    found = {
        name.replace(".default.", "."): p.detach().cpu() for name, p in model.named_parameters() if ".lora_" in name
    }
    return {f"text_model.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in found.items()}


def _inject(model: Any, ranks: dict[str, int]) -> None:
    """Insert adapters into the modules that match a pattern, with its rank; rank 0 inserts none. The scale is 1."""
    from peft import LoraConfig, inject_adapter_in_model

    ranks = {pattern: rank for pattern, rank in ranks.items() if rank}
    if not ranks:
        return
    config = LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules="|".join(ranks),
        rank_pattern=ranks,
        alpha_pattern=ranks,
    )
    inject_adapter_in_model(config, model)
