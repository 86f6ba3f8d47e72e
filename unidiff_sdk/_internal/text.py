"""Text that is printed safely: on one line, without characters that deceive the reader, and without secrets."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn, Self

__all__ = ["Secret", "hide_key", "json_text", "redact_url", "shorten", "terminal_safe"]

REDACTED = "***"


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


class Secret(str):
    """A key that is never shown: `repr`, `str` and `format` give stars, and pickle refuses it.

    It keeps a key out of the `repr` of what holds it, out of logs, and out of tracebacks that show local variables.
    `reveal` gives the key itself.
    """

    __slots__ = ()

    @classmethod
    def of(cls, key: str | None) -> Secret | None:
        """The key as a secret; None stays None."""
        return key if key is None or isinstance(key, cls) else cls(key)

    def reveal(self) -> str:
        """The key as a plain string. Pass it on without storing it in a variable."""
        return str.__str__(self)

    def __repr__(self) -> str:
        return repr(REDACTED)

    def __str__(self) -> str:
        return REDACTED

    def __format__(self, spec: str) -> str:
        return format(REDACTED, spec)

    def __getitem__(self, part: Any) -> Secret:
        return Secret(super().__getitem__(part))  # tracebacks shorten what they show

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("An API key is not pickled. Pass it again in the other process.")


def hide_key(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with `api_key` as a secret."""
    return {name: Secret.of(value) if name == "api_key" else value for name, value in arguments.items()}


def redact_url(url: str) -> str:
    """The URL without user name, password, query and fragment, any of which can hold a key."""
    url = re.sub(r"^([a-z][a-z0-9+.-]*://)[^/?#]*@", rf"\1{REDACTED}@", url, flags=re.IGNORECASE)
    return re.sub(r"[?#].*", lambda match: f"{match[0][0]}{REDACTED}", url, count=1, flags=re.DOTALL)


def _escape(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_letter(letter: str) -> str:
    # json.dumps escapes line breaks in strings, so those that are left come from the indentation.
    if letter.isprintable() or letter == "\n":
        return letter
    return json.dumps(letter)[1:-1] if ord(letter) != 0x7F else "\\u007f"
