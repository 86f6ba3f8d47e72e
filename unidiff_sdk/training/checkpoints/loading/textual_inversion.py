"""Textual inversion: tokens of the prompt with learned vectors (Gal et al. 2022, arXiv:2208.01618), added by diffusers.

    diffusers    {"<token>": float[width] or float[vectors, width]}
    AUTOMATIC1111    {"emb_params": float[vectors, width]}, and the file's name is the token

diffusers names the vectors of a token <token>, <token>_1, <token>_2 and so on. `expand_tokens` puts them into prompts.
"""

from __future__ import annotations

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
SDXL = {"clip_l", "clip_g"}  # the vectors for its two text encoders


def with_names(inversions: tuple[TextualInversion, ...]) -> tuple[TextualInversion, ...]:
    """Fill in the names of the tokens from the files. Raises CheckpointError if a file is not a textual inversion."""
    return tuple(each._replace(token=_read(each)[0]) for each in inversions)


def add_tokens(pipeline: Any, inversions: tuple[TextualInversion, ...]) -> None:
    """Add tokens to the tokenizer and the text encoder of a StableDiffusionPipeline, in place.

    Raises:
        CheckpointError: A file cannot be read, or does not fit the models. The models are then unchanged.
    """
    vectors = dict[str, Tensor]()
    for each in inversions:
        token, tensor = _read(each)
        _check(pipeline, each.file, token, tensor)
        for other in vectors:
            if token.lower() in other.lower() or other.lower() in token.lower():
                raise _refusal(each.file, f"its token {token!r} is part of the token {other!r}, or the reverse")
        vectors[token] = tensor
    for token, tensor in vectors.items():
        pipeline.load_textual_inversion({token: tensor.float()})


def _read(inversion: TextualInversion) -> tuple[str, Tensor]:
    """The name of the token and its vectors: float[vectors, width]."""
    file = inversion.file
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _refusal(file, f"it cannot be read ({error})") from error
    if tensors.keys() >= SDXL:
        raise _refusal(file, "it is for the two text encoders of SDXL")
    if len(tensors) != 1:
        raise _refusal(file, f"it holds {len(tensors)} tensors instead of one")
    ((name, tensor),) = tensors.items()
    token = inversion.token or (file.stem if name == UNNAMED else name)
    if token.split() != [token]:
        raise _refusal(file, f"its token {token!r:.60} has spaces; name another one as FILE:TOKEN")
    return token, tensor[None] if tensor.ndim == 1 else tensor


def _check(pipeline: Any, file: Path, token: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless the vectors of a token fit the models."""
    config = pipeline.text_encoder.config
    width, most = config.hidden_size, config.max_position_embeddings - 2  # a start and an end token
    if tensor.ndim != 2 or tensor.shape[1] != width:
        raise _refusal(file, f"it holds a tensor of shape {list(tensor.shape)}, but the text encoder has width {width}")
    if not 1 <= len(tensor) <= most:
        raise _refusal(file, f"it has {len(tensor)} vectors, but a prompt has room for {most}")
    if not torch.isfinite(tensor.float()).all():
        raise _refusal(file, "it holds values that are not finite")
    known = {name.lower() for name in pipeline.tokenizer.get_vocab()}
    names = [token, *(f"{token}_{i}" for i in range(1, len(tensor) + 1))]
    if taken := [name for name in names if name.lower() in known]:
        raise _refusal(file, f"the vocabulary already has the token {taken[0]!r}; name another one as FILE:TOKEN")


def _refusal(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The textual inversion {file} does not fit the base: {reason}. Nothing was added. Use one in the format of "
        "diffusers or AUTOMATIC1111 that was trained for this Stable Diffusion."
    )
