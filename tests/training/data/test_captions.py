"""Captions that are longer than the model's tokens."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize, warn_about_long_captions  # noqa: E402


def test_long_captions_warn_once_with_their_number(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    tokenizer, other = checkpoint.tokenizer, checkpoint.clip_tokenizer
    limit = tokenizer.model_max_length
    exact = "a"
    while len(tokenizer(f"{exact} a").input_ids) <= limit:
        exact += " a"
    captions = ["red", exact, f"{exact} a", "blue " * 500, "x" * 100_000]
    with pytest.warns(UserWarning) as warned:
        warn_about_long_captions([tokenizer, other], captions, "shop")
    assert len(warned) == 1
    message = str(warned[0].message)
    assert f"shop: 3 of 5 captions are longer than the {limit} tokens" in message
    assert tokenize(tokenizer, captions).shape == (5, limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_long_captions([tokenizer], ["red", exact], "shop")
        warn_about_long_captions([tokenizer], [], "shop")
