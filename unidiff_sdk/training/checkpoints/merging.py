"""State dicts with low-rank adapters merged into the weights that they adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["merged_state_dict"]


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of `model` with its low-rank adapters (peft) added to the adapted weights: W + ΔW.

    The names are those of a model without adapters. The model itself stays unchanged, so training can continue.
    """
    tensors = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            tensors[f"{name}.weight"] = layer.base_layer.weight + delta
    return tensors
