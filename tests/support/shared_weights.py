"""Models of full depth in little memory."""

from __future__ import annotations

from typing import TypeVar

from torch import Size, nn, randn

Model = TypeVar("Model", bound=nn.Module)


def share_weights(model: Model) -> Model:
    """Give a model on the meta device random parameters, one tensor for all of the same shape and kind."""
    shared: dict[tuple[Size, bool], nn.Parameter] = {}
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            is_scale = weight.ndim == 1 and name == "weight"  # only norms have vectors as weights
            if (weight.shape, is_scale) not in shared:
                spread = 0.02 if weight.ndim == 1 else weight[0].numel() ** -0.5
                shared[weight.shape, is_scale] = nn.Parameter(is_scale + spread * randn(weight.shape))
            setattr(module, name, shared[weight.shape, is_scale])
    return model
