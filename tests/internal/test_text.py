"""Text from outside, printed safely."""

from __future__ import annotations

import json
import logging
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unidiff_sdk._internal.text import json_text, shorten, terminal_safe
from unidiff_sdk._internal.warnings import safe_logger, warn
from unidiff_sdk.errors import OptionError, StoreError, UniDiffError

# What a caption must not send to a terminal: a color, a title, a link, the clipboard, C1, DEL, a false second line.
ATTACKS = [
    "\x1b[2J",
    "\x1b]0;title\x07",
    "\x1b]8;;http://evil.example\x1b\\link",
    "\x1b]52;c;cm0gLXJm\x07",
    "\x9b31m",
    "\x7f\b\b\b",
    "ok\r\nError: false",
    "\u202egnp.exe\u202c",
    "\u2066x\u2069\u061c\u200e",
    "zero\u200b\u200d\ufeff",
    "line\u2028sep\u2029",
    "\U000e0041tag",
    "\ud800",
]


@given(st.text(st.characters()))
def test_terminal_safe_text_is_printable(text: str) -> None:
    safe = terminal_safe(text)
    assert safe.isprintable() and terminal_safe(safe) == safe
    assert "".join(c for c in text if c.isprintable() and c != "\\") == "".join(
        c for c in text if c in safe and c.isprintable() and c != "\\"
    )


def test_terminal_safe_keeps_letters_and_escapes_the_rest() -> None:
    assert terminal_safe("größe\u00a0💡\t紅い\n[bold]") == "größe 💡 紅い [bold]"
    assert terminal_safe("\x1b[2J\x9b\u202e\U000e0041\ud800") == r"\x1b[2J\x9b\u202e\U000e0041\ud800"


@given(st.text(st.characters()), st.integers(1, 30))
def test_shorten_limits_the_length(text: str, length: int) -> None:
    short, whole = shorten(text, length), terminal_safe(text)
    assert len(short) == min(len(whole), length)
    assert short == whole if len(whole) <= length else short == whole[: length - 1] + "…"


def test_shorten_none_is_empty() -> None:
    assert shorten(None) == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@given(JSON, st.sampled_from([None, 2]))
def test_json_text_is_printable_json_of_the_same_value(value: object, indent: int | None) -> None:
    text = json_text(value, indent=indent)
    assert json.loads(text) == value
    assert text.replace("\n", "").isprintable() and (indent or "\n" not in text)


def test_json_text_keeps_letters() -> None:
    assert json_text({"größe": "💡\x7f\x9b\u202e"}) == r'{"größe": "💡\u007f\u009b\u202e"}'


@pytest.mark.parametrize("attack", ATTACKS)
def test_errors_warnings_and_log_lines_are_printable(attack: str, caplog: pytest.LogCaptureFixture) -> None:
    for error in (StoreError(f"no {attack}"), OptionError(f"no {attack}"), UniDiffError(attack)):
        assert str(error).isprintable() and attack in error.args[0]
        assert "".join(traceback.format_exception(error)).replace("\n", "").isprintable()
    with pytest.warns(UserWarning) as warned:
        warn(f"caption {attack}")
    assert str(warned[0].message).isprintable()
    logger = safe_logger("unidiff_sdk.test_text")
    with caplog.at_level(logging.INFO):
        logger.info("%s: %d of %.1f", attack, 3, 4.0)
    assert caplog.messages == [f"{terminal_safe(attack)}: 3 of 4.0"]
