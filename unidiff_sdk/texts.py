"""What Python takes for a string, and no tokenizer, engine or file can hold: half of a surrogate pair."""

from __future__ import annotations

from .errors import OptionError

__all__ = ["checked_text"]


def checked_text(text: str) -> str:
    """The text itself. Raises OptionError if it is not valid Unicode, as JSON's "\\ud83d" alone is not."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionError(
            f"{text!r:.60} is not valid Unicode: {text[error.start]!r} at {error.start} is half a character"
        ) from None
    return text
