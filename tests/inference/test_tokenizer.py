"""Errors of the tokenizers library, damaged files and panics, become BundleErrors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.bundle import TINY
from unidiff_sdk.inference.encoder import load_tokenizer
from unidiff_sdk.inference.tokenizer import tokenizer_errors


class PanicException(BaseException):  # of pyo3: no subclass of Exception
    """What a panic in Rust raises."""


def test_panics_and_errors_are_bundle_errors_and_interrupts_are_not() -> None:
    for raised in (PanicException("index out of bounds"), Exception("no model"), ValueError("x")):
        with pytest.raises(BundleError, match="the tokenizer cannot be read"), tokenizer_errors("shop"):
            raise raised
    with pytest.raises(KeyboardInterrupt), tokenizer_errors("shop"):
        raise KeyboardInterrupt


PAD = {"content": "!", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


@pytest.mark.parametrize("has_tokenizer_json", [True, False])
@pytest.mark.parametrize(
    ("config", "special_tokens"),
    [
        ({}, None),
        ({}, {"pad_token": "!"}),
        ({}, {"pad_token": PAD}),
        ({"pad_token": "!"}, None),
        ({"pad_token": PAD | {"__type": "AddedToken"}}, None),
        ({"added_tokens_decoder": {}}, {"pad_token": "!"}),
    ],
)
def test_pad_token_is_read_as_transformers_reads_it(
    tmp_path: Path, has_tokenizer_json: bool, config: dict[str, Any], special_tokens: dict[str, Any] | None
) -> None:
    """Stable Diffusion 2 pads with "!", which transformers 4 wrote to special_tokens_map.json."""
    transformers = pytest.importorskip("transformers", reason="needs the train extra")
    folder = tmp_path / "tokenizer"
    shutil.copytree(TINY / "tokenizer", folder)
    if not has_tokenizer_json:
        (folder / "tokenizer.json").unlink()
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if special_tokens is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens))
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), load_tokenizer(folder, 32)
    for text in ("red dress", "wow!", "! !!", "a<|endoftext|>b", "WOW!x", ""):
        expected = theirs([text], padding="max_length", max_length=32, truncation=True).input_ids[0]
        assert ours.encode(text).ids == expected, text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]", b"{}", b'{"pad_token": {}}', b""])
def test_damaged_files_are_bundle_errors(toy: Path, tmp_path: Path, name: str, content: bytes) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(toy / "tokenizer", folder)
    assert load_tokenizer(folder, 12)
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError):
        load_tokenizer(folder, 12)
    (folder / name).write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 2**40}, "merges": []}}))
    with pytest.raises(BundleError):
        load_tokenizer(folder, 12)


def test_length_that_special_tokens_exceed_is_refused(toy: Path) -> None:
    with pytest.raises(BundleError, match="where the manifest states 1"):
        load_tokenizer(toy / "tokenizer", 1)
