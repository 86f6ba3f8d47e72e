"""A model's weights as a model without adapters has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["merged_state_dict"]


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of `model`, its low-rank adapters (peft's) added to the weights that they adapt.

    The model itself stays as it is, so that it can go on learning.
    """
    tensors = {
        name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            tensors[f"{name}.weight"] = layer.base_layer.weight + delta
    return tensors
