"""Captions: tokens, normalization, and the groups of pairs that have the same meaning."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import DataError
from unidiff_sdk.inference.encoder import cut_text
from unidiff_sdk.inference.tokenizer import expand_tokens
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.checkpoints.encoders.search_model import SearchModel, TrainableModel
from unidiff_sdk.training.checkpoints.loading.second_text_encoder import THIRD_TOKENS

if TYPE_CHECKING:
    from .pairs import Pairs

__all__ = [
    "clip_ids",
    "group_keys",
    "normalize_caption",
    "prompt_ids",
    "prompt_tokenizers",
    "representative_captions",
    "tokenize",
    "warn_about_long_captions",
]

RECORDED_CAPTIONS = 256


def tokenize(tokenizer: Any, texts: Sequence[str], length: int | None = None) -> Tensor:
    """Token ids, int64[n, tokens], padded and truncated as in the diffusers pipeline.

    length: Number of tokens. Default: the tokenizer's length.
    """
    length = length or tokenizer.model_max_length
    ids: Tensor = tokenizer(
        [expand_tokens(cut_text(text, length), tokenizer.added_tokens_encoder) for text in texts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return ids


def prompt_tokenizers(checkpoint: TrainableModel) -> list[Any]:
    """The tokenizer of each CLIP text encoder of the UNet. Without a UNet, that of the encoder of texts."""
    second = [checkpoint.second.tokenizer] if isinstance(checkpoint, Checkpoint) and checkpoint.second else []
    return [checkpoint.tokenizer, *second]


def prompt_ids(checkpoint: TrainableModel, texts: Sequence[str]) -> Tensor:
    """Token ids for the text encoders of the UNet: int64[n, tokens]. Without a UNet, those for the encoder of texts.

    For Stable Diffusion XL and 3, the tokens for the second text encoder follow those for the first, of the same
    number. Those for a third text encoder, THIRD_TOKENS, come last.
    """
    ids = [tokenize(tokenizer, texts) for tokenizer in prompt_tokenizers(checkpoint)]
    if isinstance(checkpoint, Checkpoint) and checkpoint.third:
        ids.append(tokenize(checkpoint.third.tokenizer, texts, THIRD_TOKENS))
    return torch.cat(ids, dim=1)


def clip_ids(checkpoint: TrainableModel, texts: Sequence[str]) -> Tensor | None:
    """Token ids for CLIP's text tower: int64[n, tokens]. None if they are those of `prompt_ids`."""
    if isinstance(checkpoint, SearchModel) or (checkpoint.shared_layers and checkpoint.second is None):
        return None
    return tokenize(checkpoint.clip_tokenizer, texts)


def warn_about_long_captions(tokenizers: Sequence[Any], captions: Sequence[str], source: object) -> None:
    """Warn once if captions have more tokens than a tokenizer's length, with their number.

    Args:
        tokenizers: of the generator and of CLIP; the same one may occur twice.
        captions: the captions.
        source: the data, for the message.
    """
    limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
    # A token has at least one byte, so most captions need not be tokenized here. Two tokens mark start and end.
    long = [cut_text(caption, limit) for caption in captions if len(caption.encode()) + 2 > limit]
    if not long:
        return
    lengths = [
        max(map(len, ids)) for ids in zip(*(_all_tokens(tokenizer, long) for tokenizer in tokenizers), strict=True)
    ]
    if count := sum(length > limit for length in lengths):
        warn(
            f"{source}: {count:,} of {len(captions):,} captions are longer than the {limit} tokens of the model, so "
            f"their ends are ignored. The longest has {max(lengths)} or more. Shorten them, or put what matters first."
        )


def _all_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids without padding and truncation."""
    expanded = [expand_tokens(text, tokenizer.added_tokens_encoder) for text in texts]
    ids: list[list[int]] = tokenizer(expanded, verbose=False).input_ids
    return ids


def normalize_caption(caption: str) -> str:
    """The caption without differences in case, punctuation and spacing."""
    return " ".join(re.sub(f"[{re.escape(string.punctuation)}]", " ", caption.casefold()).split())


def group_keys(pairs: Pairs, columns: Sequence[str] = ()) -> list[tuple[Any, ...]]:
    """Key of each pair's meaning: pairs with equal keys have the same meaning.

    The key is the pair's values in `columns`. Without columns, or if the pair lacks one of them, it is the normalized
    caption.

    Raises DataError if no row has a column.
    """
    by_caption: list[tuple[Any, ...]] = [(normalize_caption(caption),) for caption in pairs.captions]
    if not columns:
        return by_caption
    present = {column for payload in pairs.payloads for column in payload}
    for column in columns:
        if column not in present:
            known = ", ".join(sorted(present)) or "none"
            raise DataError(f"No row has a column {column!r}. Columns of the data: {known}.")
    return [
        ("columns", *(str(payload[column]) for column in columns))
        if all(payload.get(column) is not None for column in columns)
        else ("caption", *caption)
        for payload, caption in zip(pairs.payloads, by_caption, strict=True)
    ]


def representative_captions(captions: Sequence[str]) -> list[str]:
    """Up to 256 distinct captions, evenly spaced over the data.

    A checkpoint records them, and an export calibrates and verifies with them.
    """
    distinct = list(dict.fromkeys(captions))
    return distinct[:: max(1, -(-len(distinct) // RECORDED_CAPTIONS))]
