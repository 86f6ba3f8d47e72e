"""Textual inversion: tokens of the prompt with learned vectors (Gal et al. 2022, arXiv:2208.01618), added by diffusers.

    diffusers    {"<token>": float[width] or float[vectors, width]}
    AUTOMATIC1111    {"emb_params": float[vectors, width]}, and the file's name is the token
    Stable Diffusion XL    {"clip_l": float[vectors, width], "clip_g": float[vectors, width of the second encoder]}

diffusers names the vectors of a token <token>, <token>_1, <token>_2 and so on. `expand_tokens` puts them into prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from unidiff_sdk.errors import CheckpointError

from .options import TextualInversion

__all__ = ["add_tokens", "with_names"]

UNNAMED = "emb_params"
FIRST, SECOND = "clip_l", "clip_g"  # the vectors for the two text encoders of Stable Diffusion XL
PARTS = {FIRST: ("text_encoder", "tokenizer"), SECOND: ("text_encoder_2", "tokenizer_2")}  # of a pipeline


def with_names(inversions: tuple[TextualInversion, ...]) -> tuple[TextualInversion, ...]:
    """Fill in the names of the tokens from the files. Raises CheckpointError if a file is not a textual inversion."""
    return tuple(each._replace(token=_read(each)[0]) for each in inversions)


def add_tokens(pipeline: Any, inversions: tuple[TextualInversion, ...]) -> None:
    """Add tokens to the tokenizers and text encoders of a pipeline of Stable Diffusion 1, 2 or XL, in place.

    Raises:
        CheckpointError: A file cannot be read, or does not fit the models. The models are then unchanged.
    """
    vectors = dict[str, dict[str, Tensor]]()
    for each in inversions:
        token, tensors = _read(each)
        _check_encoders(pipeline, each.file, tensors)
        for part, tensor in tensors.items():
            encoder, tokenizer = (getattr(pipeline, name) for name in PARTS[part])
            _check(encoder, tokenizer, each.file, token, tensor)
        for other in vectors:
            if token.lower() in other.lower() or other.lower() in token.lower():
                raise _refusal(each.file, f"its token {token!r} is part of the token {other!r}, or the reverse")
        vectors[token] = tensors
    for token, tensors in vectors.items():
        for part, tensor in tensors.items():
            encoder, tokenizer = (getattr(pipeline, name) for name in PARTS[part])
            pipeline.load_textual_inversion({token: tensor.float()}, text_encoder=encoder, tokenizer=tokenizer)


def _read(inversion: TextualInversion) -> tuple[str, dict[str, Tensor]]:
    """The name of the token, and its vectors for each text encoder: float[vectors, width]."""
    file = inversion.file
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _refusal(file, f"it cannot be read ({error})") from error
    if tensors.keys() == PARTS.keys():
        name = UNNAMED
    elif len(tensors) == 1:
        ((name, tensor),) = tensors.items()
        tensors = {FIRST: tensor}
    else:
        raise _refusal(file, f"it holds {len(tensors)} tensors instead of one, or of {FIRST} and {SECOND}")
    token = inversion.token or (file.stem if name == UNNAMED else name)
    if token.split() != [token]:
        raise _refusal(file, f"its token {token!r:.60} has spaces; name another one as FILE:TOKEN")
    return token, {part: tensor[None] if tensor.ndim == 1 else tensor for part, tensor in tensors.items()}


def _check_encoders(pipeline: Any, file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless a token has vectors for each text encoder of the pipeline, and equally many."""
    is_xl = hasattr(pipeline, "text_encoder_2")
    if not is_xl and SECOND in tensors:
        raise _refusal(file, "it is for the two text encoders of SDXL")
    if is_xl and SECOND not in tensors:
        raise _refusal(file, f"it holds vectors for one text encoder, but SDXL has two ({FIRST} and {SECOND})")
    if len({len(tensor) for tensor in tensors.values()}) != 1:
        counts = " and ".join(f"{len(tensor)} in {part}" for part, tensor in sorted(tensors.items()))
        raise _refusal(file, f"it has {counts}, but a token has equally many vectors for each text encoder")


def _check(encoder: Any, tokenizer: Any, file: Path, token: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless the vectors of a token fit a text encoder and its tokenizer."""
    config = encoder.config
    width, most = config.hidden_size, config.max_position_embeddings - 2  # a start and an end token
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise _refusal(file, f"it holds a tensor of shape {list(tensor.shape)}, but the text encoder has width {width}")
    if not 1 <= len(tensor) <= most:
        raise _refusal(file, f"it has {len(tensor)} vectors, but a prompt has room for {most}")
    if not torch.isfinite(tensor.float()).all():
        raise _refusal(file, "it holds values that are not finite")
    known = {name.lower() for name in tokenizer.get_vocab()}
    names = [token, *(f"{token}_{i}" for i in range(1, len(tensor) + 1))]
    if taken := [name for name in names if name.lower() in known]:
        raise _refusal(file, f"the vocabulary already has the token {taken[0]!r}; name another one as FILE:TOKEN")


def _refusal(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The textual inversion {file} does not fit the base: {reason}. Nothing was added. Use one in the format of "
        "diffusers or AUTOMATIC1111 that was trained for this Stable Diffusion."
    )
