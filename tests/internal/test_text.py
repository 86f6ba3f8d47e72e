"""Text from outside: validation and safe printing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unidiff_sdk._internal.text import checked_text, shorten, terminal_safe
from unidiff_sdk.errors import OptionError


@given(st.text(st.characters(codec="utf-8")))
def test_valid_unicode_is_returned(text: str) -> None:
    assert checked_text(text) == text


def test_lone_surrogate_is_an_error_with_its_position() -> None:
    with pytest.raises(OptionError, match=r"not valid Unicode: it has a lone surrogate .* at 4"):
        checked_text("red \ud83d dress")


@given(st.text())
def test_terminal_safe_text_has_no_control_characters(text: str) -> None:
    safe = terminal_safe(text)
    assert len(safe) == len(text) and (safe.isprintable() or not safe)


@given(st.text(), st.integers(1, 30))
def test_shorten_limits_the_length(text: str, length: int) -> None:
    short = shorten(text, length)
    assert len(short) == min(len(text), length)
    assert short == terminal_safe(text) if len(text) <= length else short.endswith("…")


def test_shorten_none_is_empty() -> None:
    assert shorten(None) == ""
