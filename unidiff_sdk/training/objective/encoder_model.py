"""The encoders of texts and images, which training tunes with or without a generator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unidiff_sdk.training.config import Precision

from . import losses
from .batch import Batch, Conditions

__all__ = ["EncoderModel", "ImageTower", "checkpoint_activations"]


class ImageTower(nn.Module):
    """f: the image encoder and its projection, onto the unit sphere. SigLIP has no projection."""

    def __init__(self, clip: Any) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = getattr(clip, "visual_projection", nn.Identity())

    def forward(self, clip_pixels: Tensor) -> Tensor:
        """Embed images. float[n, 3, s, s], normalized for the encoder -> float[n, d], unit rows."""
        return F.normalize(self.visual_projection(self.vision_model(clip_pixels).pooler_output).float(), dim=-1)

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Eval mode within the block: no dropout, and no activation checkpointing.

        Checkpointing would recompute the activations with the weights that the tower has by then.
        """
        training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(training)


class EncoderModel(nn.Module):
    """The trainable encoders of a CLIP or SigLIP.

    Args:
        clip: CLIPModel or SiglipModel of transformers.
        normalization: Mean and standard deviation of each RGB channel, by which pixels in [0, 1] are normalized.
        precision: "bf16" and "fp16" run the matrix products within `autocast` in half precision. Weights stay float32.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self, clip: Any, normalization: tuple[Sequence[float], Sequence[float]], precision: Precision = "fp32"
    ) -> None:
        super().__init__()
        self.precision = precision
        self.clip = clip
        self.f = ImageTower(clip)
        for name, values in zip(("image_mean", "image_std"), normalization, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.clip_size: int = clip.config.vision_config.image_size

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.image_mean.device

    @property
    def logit_bias(self) -> nn.Parameter | None:
        """Bias of the sigmoid loss, a learned scalar. None for a CLIP, which is trained with InfoNCE."""
        bias: nn.Parameter | None = getattr(self.clip, "logit_bias", None)
        return bias

    def autocast(self) -> torch.autocast:
        """Context of the forward passes. Losses stay outside, because bfloat16 has three decimal digits."""
        half = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, half, enabled=self.precision != "fp32")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients within the block."""
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(training)

    def checkpoint_activations(self) -> None:
        """Recompute most activations in the backward pass instead of keeping them.

        Chen et al. 2016, "Training deep nets with sublinear memory cost".
        """
        checkpoint_activations(self.clip)

    def to_clip(self, pixels: Tensor) -> Tensor:
        """Crop images to their center square, resize and normalize them for the image encoder. Differentiable.

        pixels: float[n, 3, h, w] in [0, 1]. Returns float[n, 3, s, s].
        """
        side = min(pixels.shape[-2:])
        top, left = ((edge - side) // 2 for edge in pixels.shape[-2:])
        pixels = pixels[..., top : top + side, left : left + side]
        if pixels.shape[-1] != self.clip_size:
            pixels = F.interpolate(pixels, (self.clip_size,) * 2, mode="bicubic", antialias=True)
        return (pixels - self.image_mean) / self.image_std

    def encode_captions(
        self, batch: Batch, dropped: Tensor, empty_ids: Tensor, *, pooled: bool
    ) -> tuple[Conditions, Tensor | None]:
        """Encode captions for search. Arguments and results as in `JointModel`; there are no conditions."""
        return Conditions(batch.latents[:0]), self.pool_text(batch.input_ids) if pooled else None

    def pool_text(self, clip_ids: Tensor) -> Tensor:
        """Pooled states of texts, float[n, width], of their tokens, int64[n, tokens]."""
        pooled: Tensor = self.clip.text_model(clip_ids).pooler_output
        return pooled

    def text_embeds(self, pooled: Tensor) -> Tensor:
        """g: project pooled text states, float[n, width], onto the unit sphere, float[n, d].

        The pooled states of SigLIP are projected already.
        """
        projected = self.clip.text_projection(pooled) if self.logit_bias is None else pooled
        return F.normalize(projected.float(), dim=-1)

    def contrast(self, u: Tensor, v: Tensor, positives: Tensor) -> Tensor:
        """ITC as the encoders were trained: InfoNCE for CLIP, the sigmoid loss for SigLIP. See `losses.itc`."""
        if self.logit_bias is None:
            return losses.itc(u, v, self.clip.logit_scale, positives)
        return losses.sigmoid_itc(u, v, self.clip.logit_scale, self.logit_bias, positives)

    def contrast_parameters(self) -> list[nn.Parameter]:
        """Parameters of ITC that belong to no encoder: the temperature, and the bias of the sigmoid loss."""
        return [self.clip.logit_scale, *([] if self.logit_bias is None else [self.logit_bias])]

    def clamp_temperature(self) -> None:
        """Keep the temperature of a CLIP in its bounds. That of SigLIP has none."""
        if self.logit_bias is None:
            losses.clamp_logit_scale(self.clip.logit_scale)

    def unused_weights(self) -> set[nn.Parameter]:
        """Weights that no output depends on, so that nothing trains them."""
        return set()


def checkpoint_activations(model: Any) -> None:
    """Enable activation checkpointing in a model of transformers."""
    # transformers 6 has the first name only, 4 and early 5 the second.
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next(getattr(model, name) for name in names if hasattr(model, name))
    # With reentrant checkpointing, transformers 4's default, adapters above frozen embeddings learn nothing.
    enable({"use_reentrant": False})
