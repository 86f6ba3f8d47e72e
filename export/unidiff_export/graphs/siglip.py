"""The encoders of SigLIP and SigLIP 2, as modules that lower to one node for each attention.

transformers pools the image with torch's `MultiheadAttention`, which computes its weights in single steps. The same
weights in linear layers around `scaled_dot_product_attention` become one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Siglip2Model, SiglipModel


class AttentionPooling(nn.Module):
    """SigLIP's pooling head: a learned query attends to all patches, followed by a residual MLP."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        attention: nn.MultiheadAttention = head.attention
        width = attention.embed_dim
        self.heads, self.probe = attention.num_heads, head.probe
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
        for layer, weight, bias in zip((self.q_proj, self.k_proj, self.v_proj), weights, biases, strict=True):
            layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        self.out_proj, self.layernorm, self.mlp = attention.out_proj, head.layernorm, head.mlp

    def forward(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """float[batch, patches, width] to float[batch, width]. mask: bool[batch, 1, 1, patches], False for padding."""
        query = self.q_proj(self.probe).expand(len(patches), -1, -1)
        attended = nn.functional.scaled_dot_product_attention(
            self._by_head(query), self._by_head(self.k_proj(patches)), self._by_head(self.v_proj(patches)), mask
        )
        pooled = self.out_proj(attended.transpose(1, 2).flatten(2))[:, 0]
        result: Tensor = pooled + self.mlp(self.layernorm(pooled))
        return result

    def _by_head(self, states: Tensor) -> Tensor:
        return states.unflatten(2, (self.heads, -1)).transpose(1, 2)


class SiglipTextEmbedder(nn.Module):
    """Token ids to the embedding of the text: the projected state of the last token, which may be padding."""

    def __init__(self, model: SiglipModel | Siglip2Model) -> None:
        super().__init__()
        self.tower = model.text_model

    def forward(self, input_ids: Tensor) -> Tensor:
        # Not the tower's own `forward`, which prepares a mask for padding: SigLIP was trained without one.
        states = self.tower.encoder(inputs_embeds=self.tower.embeddings(input_ids=input_ids)).last_hidden_state
        embedding: Tensor = self.tower.head(self.tower.final_layer_norm(states)[:, -1])
        return embedding.float()


class SiglipImageEncoder(nn.Module):
    """Normalized pixels to the embedding of the image."""

    def __init__(self, model: SiglipModel) -> None:
        super().__init__()
        tower = model.vision_model
        self.embeddings, self.encoder, self.norm = tower.embeddings, tower.encoder, tower.post_layernorm
        self.pooling = AttentionPooling(tower.head)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.embeddings(pixel_values.to(self.norm.weight.dtype))
        states = self.norm(self.encoder(inputs_embeds=patches).last_hidden_state)
        embedding: Tensor = self.pooling(states)
        return embedding.float()


class NaflexImageEncoder(nn.Module):
    """Patches of images of any aspect ratio to the embeddings of the images.

    transformers interpolates the positions of each image in a loop. That interpolation, bilinear and antialiased, is a
    product with weights of rows and of columns, which is one graph for all sizes.
    """

    def __init__(self, model: Siglip2Model) -> None:
        super().__init__()
        tower = model.vision_model
        self.patch_embedding, self.positions = tower.embeddings.patch_embedding, tower.embeddings.position_embedding
        self.side = tower.embeddings.position_embedding_size
        self.encoder, self.norm = tower.encoder, tower.post_layernorm
        self.pooling = AttentionPooling(tower.head)

    def forward(self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> Tensor:
        """float[batch, patches, values], int32[batch, patches] and int64[batch, 2] to float[batch, width]."""
        dtype, count = self.norm.weight.dtype, pixel_values.shape[1]
        height, width = (spatial_shapes[:, axis : axis + 1].float() for axis in (0, 1))
        place = torch.arange(count, dtype=torch.float32)[None]
        place = torch.where(place < height * width, place, torch.zeros_like(place))  # padding is masked
        row = torch.floor((place + 0.5) / width)
        by_row, by_column = self._weights(row, height), self._weights(place - row * width, width)
        weights = (by_row[..., :, None] * by_column[..., None, :]).flatten(2)
        positions = weights.to(dtype) @ self.positions.weight
        mask = pixel_attention_mask.bool()[:, None, None, :]
        states = self.patch_embedding(pixel_values.to(dtype)) + positions
        states = self.encoder(inputs_embeds=states, attention_mask=mask.expand(-1, 1, count, -1)).last_hidden_state
        embedding: Tensor = self.pooling(self.norm(states), mask)
        return embedding.float()

    def _weights(self, place: Tensor, size: Tensor) -> Tensor:
        """Weights of the trained positions along one axis, float[batch, patches, side], at places of a new size.

        A triangle around each place, which is wider where the size shrinks, as in `torch.nn.functional.interpolate`.
        """
        scale = self.side / size
        center = (place + 0.5) * scale
        trained = torch.arange(self.side, dtype=torch.float32) + 0.5
        distance = (trained - center[..., None]).abs() / scale.clamp(min=1)[..., None]
        weights = (1 - distance).clamp(min=0)
        return weights / weights.sum(dim=-1, keepdim=True)
