"""What an export can be asked for. Apart from the rest, so that --help need not import PyTorch."""

from __future__ import annotations

from unidiff_sdk.errors import OptionError

PRECISIONS = ("fp32", "fp16")
TARGETS = ("cpu",)


def check_options(precision: str, target: str) -> None:
    """Raise OptionError, naming the valid values, if either is not known."""
    for option, value, known in (("precision", precision, PRECISIONS), ("target", target, TARGETS)):
        if value not in known:
            raise OptionError(f"{option} is {value!r}; use one of {', '.join(known)}")
