"""Warnings that point to the line of the application that caused them, and log lines, both safe to print."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .text import terminal_safe

__all__ = ["quiet_logging", "safe_logger", "warn"]

_PACKAGE = __name__.split(".", maxsplit=1)[0]


def warn(message: str) -> None:
    """Issue a UserWarning that is attributed to the nearest caller outside this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".", maxsplit=1)[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(terminal_safe(message), stacklevel=level)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Within the block, log lines up to the level of warnings are dropped: those of libraries for their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def safe_logger(name: str) -> logging.Logger:
    """The logger of a module. It escapes the text in the arguments of a message: a caption cannot forge a log line."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape_arguments)
    return logger


def _escape_arguments(record: logging.LogRecord) -> bool:
    if isinstance(record.args, tuple):
        record.args = tuple(value if isinstance(value, int | float) else terminal_safe(value) for value in record.args)
    return True
