"""Warnings that point to the line of the application that caused them."""

from __future__ import annotations

import sys
import warnings

__all__ = ["warn"]

_PACKAGE = __name__.split(".", maxsplit=1)[0]


def warn(message: str) -> None:
    """Issue a UserWarning that is attributed to the nearest caller outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".", maxsplit=1)[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
