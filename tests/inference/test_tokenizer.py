"""Errors of the tokenizers library, damaged files and panics, become BundleErrors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unidiff_sdk.errors import BundleError
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
