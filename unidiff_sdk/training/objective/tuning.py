"""What is tuned of a checkpoint: each part in full, by low-rank adapters (LoRA), or not at all.

The parts are the UNet, the text side (CLIP's text tower and projection, and the pipeline's text encoder where it is
another) and the image side (CLIP's image tower and projection). Adapters are merged wherever weights are written, so
that a tuned checkpoint looks like any other; they are kept beside it in the formats of peft, diffusers and kohya.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from unidiff_sdk.errors import OptionError
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.config import Part, TrainingConfig
from unidiff_sdk.training.runtime.randomness import Purpose, seed_of

from .joint_model import JointModel

__all__ = ["ADAPTERS", "KOHYA", "add_adapters", "choose_trainable", "part_of", "save_adapters"]

ADAPTERS = "adapters"  # in the checkpoint's folder
KOHYA = "kohya.safetensors"  # in that
ATTENTION = r"to_q|to_k|to_v|to_out\.0"  # of the UNet, which diffusers' own LoRA training adapts too
TOWER = r"q_proj|k_proj|v_proj|out_proj|fc1|fc2"  # attention and MLP


def add_adapters(checkpoint: Checkpoint, config: TrainingConfig) -> None:
    """Put low-rank adapters (Hu et al. 2021, "LoRA") that change nothing yet into the parts that have a rank."""
    if not any(config.lora_rank(part) for part in Part):
        return
    torch.manual_seed(seed_of(config.seed, Purpose.WEIGHTS))
    text, image = config.lora_rank(Part.TEXT), config.lora_rank(Part.IMAGE)
    _inject(checkpoint.unet, {rf".*\.({ATTENTION})": config.lora_rank(Part.UNET)})
    _inject(
        checkpoint.clip,
        {
            rf"text_model\..*\.({TOWER})|text_projection": text,
            rf"vision_model\..*\.({TOWER})|visual_projection": image,
        },
    )
    # Layers that are CLIP's have their adapters already.
    layers = range(checkpoint.shared_layers, checkpoint.text_encoder.config.num_hidden_layers)
    own = "|".join(map(str, layers))
    _inject(checkpoint.text_encoder, {rf".*layers\.({own})\..*\.({TOWER})": text if own else 0})


def choose_trainable(model: JointModel, config: TrainingConfig) -> None:
    """Let gradients reach what is tuned, and nothing else. Raises OptionError where nothing is left."""
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if name == "clip.logit_scale":  # between texts and images
            parameter.requires_grad = config.trains_encoder and not config.locked >= {Part.TEXT, Part.IMAGE}
        elif part is None or part in config.locked:
            parameter.requires_grad = False
        else:
            parameter.requires_grad = not config.lora_rank(part) or ".lora_" in name
    if not any(p.requires_grad for p in model.parameters()):
        raise OptionError("all that the terms would teach is locked: there is nothing to train")


def part_of(name: str) -> Part | None:
    """The part that a parameter of the joint model belongs to; the VAE is none. The temperature learns as text does."""
    prefixes = {
        "unet.": Part.UNET,
        "text_encoder.": Part.TEXT,
        "clip.text_": Part.TEXT,
        "clip.logit_scale": Part.TEXT,
        "clip.vis": Part.IMAGE,
    }
    return next((part for prefix, part in prefixes.items() if name.startswith(prefix)), None)


def save_adapters(checkpoint: Checkpoint, folder: Path) -> None:
    """Write adapters as peft does, one folder a model: `PeftModel.from_pretrained(base.unet, folder / "unet")`.

    Those that draw also as diffusers does, for `StableDiffusionPipeline.load_lora_weights(folder)`, and in one file as
    kohya's scripts do, for the programs that read these: the same tensors, each with its alpha.
    """
    parts = {"unet": _adapters(checkpoint.unet), "text_encoder": _adapters(checkpoint.text_encoder)}
    layers = {f"{part}_lora_layers": convert_state_dict_to_diffusers(found) for part, found in parts.items() if found}
    if layers:
        StableDiffusionPipeline.save_lora_weights(folder, **layers)
        named = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        kohya: dict[str, Tensor] = convert_state_dict_to_kohya(named)
        # diffusers numbers the text encoder as models with two have it; those with one call it "te".
        one_encoder = {name.replace("lora_te1_", "lora_te_"): tensor.contiguous() for name, tensor in kohya.items()}
        save_file(one_encoder, folder / KOHYA)
    models = {"unet": checkpoint.unet, "clip": checkpoint.clip, "text_encoder": checkpoint.text_encoder}
    for name, model in models.items():
        if not hasattr(model, "peft_config"):
            continue
        from peft import get_peft_model_state_dict

        (folder / name).mkdir(parents=True)
        tensors: dict[str, Tensor] = get_peft_model_state_dict(model)
        # A PeftModel holds the model that it adapts one level deeper.
        prefixed = {f"base_model.model.{key}": t.detach().cpu().contiguous() for key, t in tensors.items()}
        save_file(prefixed, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
        model.peft_config["default"].save_pretrained(folder / name)


def _adapters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Under the names of a pipeline of diffusers: in transformers 5, those of the text encoder are shorter."""
    found = {
        name.replace(".default.", "."): p.detach().cpu() for name, p in model.named_parameters() if ".lora_" in name
    }
    return {f"text_model.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in found.items()}


def _inject(model: Any, ranks: dict[str, int]) -> None:
    """Adapters at the modules that match these patterns, of these ranks, 0 for none; scaled by one (alpha = rank)."""
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
