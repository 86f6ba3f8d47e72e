"""How much memory a generation takes, so that one that cannot fit is refused before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff_sdk.errors import BundleError

__all__ = ["check_architecture", "check_transformer", "image_memory"]

FLOAT_BYTES = 4
# Measured with ONNX Runtime's CPU kernels on the built-in model, and scaled with the channels: how many tensors of the
# widest kind exist at the same time.
UNET_TENSORS = 24
DECODER_TENSORS = 6

MAX_BLOCKS = 16
MAX_WIDTH = 1 << 16  # channels or heads; models have a few thousand


def check_architecture(config: Mapping[str, Any], file: Path) -> None:
    """Check what the runtime reads of a diffusers configuration: channels and types of the blocks, attention heads.

    Raises:
        BundleError: a value is missing, or has another type or size than a model can have.
    """
    channels = config.get("block_out_channels")
    if not (isinstance(channels, list) and 0 < len(channels) <= MAX_BLOCKS and all(map(_is_width, channels))):
        raise _wrong(file, "block_out_channels", channels, f"a list of 1 to {MAX_BLOCKS} numbers of channels")
    types = config.get("down_block_types", [])
    if not (isinstance(types, list) and all(isinstance(name, str) for name in types)):
        raise _wrong(file, "down_block_types", types, "a list of names")
    for name in ("num_attention_heads", "attention_head_dim"):
        heads = config.get(name)
        if not (
            heads is None or _is_width(heads) or (isinstance(heads, list) and heads and all(map(_is_width, heads)))
        ):
            raise _wrong(file, name, heads, "a number of heads, or one for each block")


def check_transformer(config: Mapping[str, Any], file: Path) -> None:
    """The same of the configuration of a transformer: patches, positions, attention heads.

    Raises:
        BundleError: a value is missing, or has another type or size than a model can have.
    """
    for name in ("patch_size", "pos_embed_max_size", "num_attention_heads", "attention_head_dim"):
        if not _is_width(config.get(name)):
            raise _wrong(file, name, config.get(name), f"an integer from 1 to {MAX_WIDTH:,}")


def _is_width(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_WIDTH


def _wrong(file: Path, name: str, value: Any, accepted: str) -> BundleError:
    return BundleError(f"{file}: {name} is {value!r:.80}; it must be {accepted}. Export the bundle again.")


def image_memory(
    denoiser: Mapping[str, Any], decoder: Mapping[str, Any], width: int, height: int, predictions: int, tokens: int = 0
) -> int:
    """Bytes that the graphs take to generate one image, beyond their weights.

    A UNet call holds its feature maps and, at the first level with attention, a square of that level's positions for
    each head. The decoder holds feature maps at full size, and the square of its middle block twice, before the softmax
    and after. For the built-in model, at 192 to 512 pixels, this is 1.05 to 1.3 of what a process grows by.

    Args:
        denoiser, decoder: their diffusers configurations, checked by `check_architecture` or `check_transformer`.
        width, height: of the latents.
        predictions: of the denoiser for each step: 2 with guidance, else 1.
        tokens: token states that a transformer attends to, besides the image.
    """
    positions = width * height
    if "patch_size" in denoiser:
        of_denoiser = predictions * _transformer_numbers(denoiser, positions, tokens)
    else:
        of_denoiser = predictions * _unet_numbers(denoiser, positions)
    decoder_channels: list[int] = list(decoder["block_out_channels"])
    enlargement = 4 ** (len(decoder_channels) - 1)
    widest = decoder_channels[min(1, len(decoder_channels) - 1)]  # what the last upsampling brings to full size
    of_decoder = DECODER_TENSORS * widest * enlargement * positions + 2 * positions**2
    return int(FLOAT_BYTES * max(of_denoiser, of_decoder))


def _transformer_numbers(transformer: Mapping[str, Any], positions: int, tokens: int) -> float:
    """Numbers that a call holds for one sample: feature maps, and a square of all tokens for each head."""
    heads, width = transformer["num_attention_heads"], transformer["attention_head_dim"]
    length = positions / transformer["patch_size"] ** 2 + tokens
    return float(UNET_TENSORS * heads * width * length + heads * length**2)


def _unet_numbers(unet: Mapping[str, Any], positions: int) -> float:
    """Numbers that a call holds for one sample: feature maps, and a square of positions for each head."""
    channels: list[int] = list(unet["block_out_channels"])
    level = next((i for i, kind in enumerate(unet.get("down_block_types", ())) if "CrossAttn" in kind), 0)
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim") or 1
    heads = heads if isinstance(heads, int) else heads[min(level, len(heads) - 1)]
    attention = heads * (positions / 4**level) ** 2
    return float(UNET_TENSORS * channels[0] * positions + attention)
