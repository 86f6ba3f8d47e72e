"""Text from outside: refusing invalid Unicode, and printing any text safely on one line."""

from __future__ import annotations

from unidiff_sdk.errors import OptionError

__all__ = ["checked_text", "shorten", "terminal_safe"]


def checked_text(text: str) -> str:
    """Return the text if it is valid Unicode, so that tokenizers, engines and files can store it.

    Raises:
        OptionError: the text contains a lone surrogate, such as the JSON string "\\ud83d".
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{text!r:.60} is not valid Unicode: it has a lone surrogate {text[error.start]!r} at {error.start}. "
            "Remove or replace it."
        ) from None
    return text


def terminal_safe(value: object) -> str:
    """Replace control characters by spaces, so that a caption cannot send commands to a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def shorten(value: object, length: int = 120) -> str:
    """At most `length` terminal-safe characters, with an ellipsis if the text is longer; "" for None."""
    text = "" if value is None else terminal_safe(value)
    return text if len(text) <= length else text[: length - 1] + "…"
