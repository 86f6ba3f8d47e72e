"""Text from outside, printed safely: on one line, and without characters that control or deceive the reader."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_text", "shorten", "terminal_safe"]


def terminal_safe(value: object) -> str:
    """Return the text of a value, safe to print on one line of a terminal, a log or a page.

    White space, line breaks included, becomes a space. Any other character that is not printable is escaped as in
    Python: control characters (ESC is "\\x1b"), marks of text direction and zero width ("\\u202e"), lone surrogates.
    A caption can then neither send commands to a terminal nor reverse or hide the text around it.
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else _escape(letter) for letter in text)


def shorten(value: object, length: int = 120) -> str:
    """At most `length` terminal-safe characters, with an ellipsis if the text is longer; "" for None."""
    text = "" if value is None else terminal_safe(str(value)[: length + 1])
    return text if len(text) <= length else text[: length - 1] + "…"


def json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Format a value as JSON that is safe to print: letters as they are, all that is not printable as \\u escapes."""
    text = json.dumps(value, indent=indent, sort_keys=sort_keys, ensure_ascii=False)
    return text if text.isprintable() else "".join(map(_json_letter, text))


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_letter(letter: str) -> str:
    # json.dumps escapes line breaks in strings, so those that are left come from the indentation.
    if letter.isprintable() or letter == "\n":
        return letter
    return json.dumps(letter)[1:-1] if ord(letter) != 0x7F else "\\u007f"
