"""Shared text layers: the layers that a pipeline's text encoder and CLIP's text tower have in common.

Stable Diffusion is conditioned by the text tower of a CLIP model. Where both hold the same weights, the text encoder
uses the parameters of CLIP's tower, so that training either of them trains both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

__all__ = ["layers_of", "share_projected_text_encoder", "share_text_layers", "tower_of"]

SETTINGS = ("hidden_act", "num_attention_heads", "layer_norm_eps")
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # that weights are stored in


def tower_of(text_model: nn.Module) -> Any:
    """The transformer itself. Up to transformers 4.57, CLIPTextModel wraps it once more as `.text_model`."""
    return getattr(text_model, "text_model", text_model)


def layers_of(text_model: nn.Module) -> nn.ModuleList:
    """The transformer layers of a text model, in order."""
    layers: nn.ModuleList = tower_of(text_model).encoder.layers
    return layers


def share_text_layers(text_encoder: CLIPTextModel, clip: CLIPModel) -> CLIPTextModel:
    """Return the text encoder with the parameters of CLIP's text tower, as far as both are equal from the input up.

    A part that one of them stores in half precision is equal if it is the other's, rounded. The more precise values are
    used for both.

    The shared part is the longest common prefix: the embeddings, then layer after layer, then the final norm if the
    text encoder has no further layer. The text encoder of SD 1.x is the whole tower of CLIP ViT-L/14. That of SD 2.x is
    the tower of OpenCLIP ViT-H/14 without its last layer.
    """
    ours, theirs = tower_of(text_encoder), tower_of(clip.text_model)
    if any(getattr(ours.config, name) != getattr(theirs.config, name) for name in SETTINGS):
        return text_encoder
    if not _equal(ours.embeddings, theirs.embeddings):
        return text_encoder
    ours.embeddings = theirs.embeddings
    for i, (own, other) in enumerate(zip(layers_of(ours), layers_of(theirs), strict=False)):
        if not _equal(own, other):
            return text_encoder
        layers_of(ours)[i] = other
    if len(layers_of(ours)) > len(layers_of(theirs)) or not _equal(ours.final_layer_norm, theirs.final_layer_norm):
        return text_encoder
    ours.final_layer_norm = theirs.final_layer_norm
    if len(layers_of(ours)) < len(layers_of(theirs)):
        return text_encoder
    if isinstance(clip.text_model, CLIPTextModel):
        return clip.text_model
    text_encoder.text_model = clip.text_model
    return text_encoder


def share_projected_text_encoder(
    text_encoder: CLIPTextModelWithProjection, clip: CLIPModel
) -> CLIPTextModelWithProjection:
    """Return a text encoder that also projects, with the parameters of CLIP's text side if all of them are equal.

    That of Stable Diffusion 3 is the text side of CLIP ViT-L/14. One that differs anywhere keeps its own parameters.
    """
    ours, theirs = tower_of(text_encoder), tower_of(clip.text_model)
    if any(getattr(ours.config, name) != getattr(theirs.config, name) for name in SETTINGS):
        return text_encoder
    if _equal(ours, theirs) and _equal(text_encoder.text_projection, clip.text_projection):
        text_encoder.text_model, text_encoder.text_projection = clip.text_model, clip.text_projection
    return text_encoder


def _equal(own: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights but for rounding. `other` receives the more precise ones."""
    ours, theirs = own.state_dict(), other.state_dict()
    if ours.keys() != theirs.keys():
        return False
    if any(all(torch.equal(ours[n], _rounded(theirs[n], precision)) for n in ours) for precision in PRECISIONS):
        return True
    if any(all(torch.equal(theirs[n], _rounded(ours[n], precision)) for n in ours) for precision in PRECISIONS):
        other.load_state_dict(ours)
        return True
    return False


def _rounded(tensor: Tensor, precision: torch.dtype) -> Tensor:
    return tensor.to(precision).to(tensor.dtype) if tensor.is_floating_point() else tensor
