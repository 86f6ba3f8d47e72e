"""The text encoders of a pipeline besides the first, and the checks of the second one's configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel

from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training.checkpoints.json_files import read_json

__all__ = [
    "SECOND_FILES",
    "THIRD_TOKENS",
    "SecondTextEncoder",
    "ThirdTextEncoder",
    "has_second_text_encoder",
    "pooled_width",
    "zero_negative",
]

MODEL_INDEX = "model_index.json"
SECOND_FILES = {
    "text_encoder_2/config.json": "second text encoder",
    "tokenizer_2/tokenizer_config.json": "tokenizer of the second text encoder",
}
THIRD_TOKENS = 256  # of the third text encoder of Stable Diffusion 3: `max_sequence_length` of diffusers' pipeline
PIPELINES = tuple(f"StableDiffusionXL{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))


@dataclass(frozen=True)
class SecondTextEncoder:
    """The text encoder of Stable Diffusion XL that also pools, in float32 and in eval mode.

    Attributes:
        model: An OpenCLIP text tower with its projection.
        tokenizer: Its tokenizer. It pads with "!".
        zero_negative: Whether zeros stand for an empty negative prompt (`force_zeros_for_empty_prompt`).
    """

    model: CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    zero_negative: bool

    @property
    def pooled_width(self) -> int:
        """Width of the pooled embedding."""
        return int(self.model.config.projection_dim)


@dataclass(frozen=True)
class ThirdTextEncoder:
    """The T5 of Stable Diffusion 3, in float32 and in eval mode.

    Attributes:
        model: The encoder of a T5.
        tokenizer: Its tokenizer.
    """

    model: T5EncoderModel
    tokenizer: Any


def has_second_text_encoder(folder: Path) -> bool:
    """Whether a pipeline folder holds Stable Diffusion XL.

    Raises:
        CheckpointError: It is the refiner, or another pipeline with two text encoders.
    """
    index = read_json(folder / MODEL_INDEX) if (folder / MODEL_INDEX).is_file() else {}
    if index.get("requires_aesthetics_score"):
        raise CheckpointError(
            f"{folder} is the refiner of Stable Diffusion XL, which takes an aesthetic score and has one text encoder. "
            "It is not supported; use the base model."
        )
    if not (folder / "text_encoder_2").is_dir():
        return False
    if (name := index.get("_class_name")) not in PIPELINES:
        raise CheckpointError(
            f"{folder} has two text encoders, but is {name!r}; with two, only {', '.join(PIPELINES)} are supported."
        )
    return True


def zero_negative(folder: Path) -> bool:
    """Whether zeros stand for an empty negative prompt. So it is where the index of the pipeline does not state it."""
    value = read_json(folder / MODEL_INDEX).get("force_zeros_for_empty_prompt", True)
    if not isinstance(value, bool):
        raise CheckpointError(
            f"{folder / MODEL_INDEX}: force_zeros_for_empty_prompt is {value!r:.60}; it must be true or false."
        )
    return value


def pooled_width(config: Mapping[str, Any]) -> Any:
    """Width of the pooled embedding, by the configuration of the second text encoder."""
    return config.get("projection_dim", 512)
