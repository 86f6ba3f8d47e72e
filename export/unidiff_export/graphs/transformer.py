"""The transformer of Stable Diffusion 3 as a module whose height and width stay dynamic in ONNX.

diffusers' own forward pass crops the position embeddings by slices with Python integers, which torch.export would fix.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

from .timesteps import one_for_each_sample


class Transformer(nn.Module):
    """Noisy latents to the velocity. `timestep` is a float for each sample, or one for all samples."""

    def __init__(self, transformer: SD3Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor
    ) -> Tensor:
        model, dtype = self.transformer, self.transformer.dtype
        timestep = one_for_each_sample(timestep, hidden_states)
        patches = model.pos_embed.proj(hidden_states.to(dtype))
        height, width = patches.shape[-2:]
        image = (patches + self._positions(height, width).to(dtype)).flatten(2).transpose(1, 2)
        condition = model.time_text_embed(timestep, pooled_projections.to(dtype))
        text = model.context_embedder(encoder_hidden_states.to(dtype))
        for block in model.transformer_blocks:
            text, image = block(hidden_states=image, encoder_hidden_states=text, temb=condition)
        image = model.proj_out(model.norm_out(image, condition)).float()
        return self._joined(image.transpose(1, 2).unflatten(2, (height, width)))

    def _positions(self, height: int, width: int) -> Tensor:
        """The embeddings of the positions in the middle of the trained ones: [1, channels, height, width]."""
        most = self.transformer.pos_embed.pos_embed_max_size
        trained = self.transformer.pos_embed.pos_embed.reshape(most, most, -1)
        rows = torch.arange(height) + (most - height) // 2
        columns = torch.arange(width) + (most - width) // 2
        return trained.index_select(0, rows).index_select(1, columns).permute(2, 0, 1)[None]

    def _joined(self, patches: Tensor) -> Tensor:
        """[batch, patch² * channels, height, width], where the channels vary fastest, to whole latents."""
        side = self.transformer.config.patch_size
        pixels = patches.unflatten(1, (side, side, -1)).permute(0, 3, 4, 1, 5, 2)
        return pixels.flatten(4, 5).flatten(2, 3)
