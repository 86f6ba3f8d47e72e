"""What is added to the models of a base, by the loaders of diffusers."""

from __future__ import annotations

from typing import Any

from unidiff_sdk._internal.warnings import warn

from .lora import changes_text_encoder, merge_loras
from .options import BaseOptions
from .second_text_encoder import SecondTextEncoder
from .textual_inversion import add_tokens

__all__ = ["add_to_models", "add_to_pipeline"]


def add_to_models(
    unet: Any, text_encoder: Any, tokenizer: Any, options: BaseOptions, second: SecondTextEncoder | None = None
) -> None:
    """Add what the options name to the models of a base, in place.

    Args:
        unet: The UNet, or the transformer of Stable Diffusion 3.
        text_encoder, tokenizer: The other models.
        options: What to add.
        second: Second text encoder of Stable Diffusion XL or 3.

    Raises:
        CheckpointError: Something does not fit.
    """
    if not (options.loras or options.textual_inversions):
        return
    # Imports all pipelines' parts, which log what they lack.
    from diffusers import (
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )

    # Without a scheduler, as the pipeline would change its configuration.
    parts: dict[str, Any] = {"vae": None, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": None}
    if second is not None:
        parts |= {"text_encoder_2": second.model, "tokenizer_2": second.tokenizer}
    pipeline: Any
    if isinstance(unet, SD3Transformer2DModel):
        pipeline = StableDiffusion3Pipeline(**parts, transformer=unet, text_encoder_3=None, tokenizer_3=None)
    elif second is not None:
        pipeline = StableDiffusionXLPipeline(**parts, unet=unet, feature_extractor=None, add_watermarker=False)
    else:
        without = {"feature_extractor": None, "safety_checker": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, unet=unet, **without)
    add_to_pipeline(pipeline, options)
    for model in (unet, text_encoder, *([second.model] if second else [])):
        model.requires_grad_(True)  # peft freezes what it adapts
    if changing := [lora.file.name for lora in options.loras if changes_text_encoder(lora)]:
        warn(
            f"{', '.join(changing)} changes the text encoder that prompts go through. Search keeps the text tower of "
            "CLIP unchanged, so that its embeddings stay comparable; the model holds both"
        )
    if tokens := [each.token for each in options.textual_inversions]:
        warn(
            f"Only prompts know the added tokens {', '.join(map(str, tokens))}. Search keeps the vocabulary and the "
            "text tower of CLIP, and reads such a token as plain text; the model holds both text encoders"
        )


def add_to_pipeline(pipeline: Any, options: BaseOptions) -> None:
    """Add what the options name to a pipeline of diffusers. Raises CheckpointError if something does not fit."""
    add_tokens(pipeline, options.textual_inversions)
    merge_loras(pipeline, options.loras)
