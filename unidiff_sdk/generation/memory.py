"""How much memory one generated image takes, so that an image that cannot fit is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["picture_memory"]

_FLOAT = 4


# Of ONNX Runtime's CPU kernels, measured on the tiny model and from there in proportion to the channels: how many
# tensors of the widest kind are alive at once.
_UNET_TENSORS = 24


_DECODER_TENSORS = 6


def picture_memory(unet: Mapping[str, Any], vae: Mapping[str, Any], width: int, height: int, rows: int) -> int:
    """Bytes that the graphs hold while they draw one picture, beyond their weights.

    A UNet call holds its feature maps and, where its attention comes first, one square of that level's positions for
    each head. The decoder holds feature maps at full size, and the square of its middle twice, before softmax and
    after. Of the built-in model, at 192 to 512 pixels, it is 1.05 to 1.3 of what a process grows by.

    Args:
        unet, vae: their diffusers configurations.
        width, height: of the latents.
        rows: 2 with guidance, else 1.
    """
    positions = width * height
    channels: list[int] = list(unet["block_out_channels"])
    level = next((i for i, kind in enumerate(unet.get("down_block_types", ())) if "CrossAttn" in kind), 0)
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim") or 1
    heads = heads if isinstance(heads, int) else heads[min(level, len(heads) - 1)]
    attention = heads * (positions / 4**level) ** 2
    of_unet = rows * (_UNET_TENSORS * channels[0] * positions + attention)

    vae_channels: list[int] = list(vae["block_out_channels"])
    enlargement = 4 ** (len(vae_channels) - 1)
    widest = vae_channels[min(1, len(vae_channels) - 1)]  # what the last upsampling brings to full size
    of_decoder = _DECODER_TENSORS * widest * enlargement * positions + 2 * positions**2
    return int(_FLOAT * max(of_unet, of_decoder))
