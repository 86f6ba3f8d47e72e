"""What is added to the models of a base, by the loaders of diffusers."""

from __future__ import annotations

from typing import Any

from unidiff_sdk._internal.warnings import warn

from .lora import changes_text_encoder, merge_loras
from .options import BaseOptions
from .textual_inversion import add_tokens

__all__ = ["add_to_models", "add_to_pipeline"]


def add_to_models(unet: Any, text_encoder: Any, tokenizer: Any, options: BaseOptions) -> None:
    """Add what the options name to the models of a base, in place. Raises CheckpointError if something does not fit."""
    if not (options.loras or options.textual_inversions):
        return
    from diffusers import StableDiffusionPipeline  # imports all pipelines' parts, which log what they lack

    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    # Without a scheduler, as the pipeline would change its configuration.
    pipeline = StableDiffusionPipeline(
        vae=None, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=None, **absent
    )
    add_to_pipeline(pipeline, options)
    for model in (unet, text_encoder):
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
    """Add what the options name to a StableDiffusionPipeline. Raises CheckpointError if something does not fit."""
    add_tokens(pipeline, options.textual_inversions)
    merge_loras(pipeline, options.loras)
