"""What Python takes for a string, and no tokenizer, engine or file can hold: half of a surrogate pair."""

from __future__ import annotations

from unidiff_sdk.errors import OptionError

__all__ = ["checked_text", "shorten", "terminal_safe"]


def checked_text(text: str) -> str:
    """The text itself. Raises OptionError if it is not valid Unicode, as JSON's "\\ud83d" alone is not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{text!r:.60} is not valid Unicode: {text[error.start]!r} at {error.start} is half a character"
        ) from None
    return text


def terminal_safe(value: object) -> str:
    """Without what a terminal would obey: a catalog's words come from anywhere."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def shorten(value: object, length: int = 120) -> str:
    """What fits into a line of a list, terminal_safe; nothing for None."""
    text = "" if value is None else terminal_safe(value)
    return text if len(text) <= length else text[: length - 1] + "…"
