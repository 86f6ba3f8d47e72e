"""Interruption between steps, never within one: what is saved then is a state that a run without it passes through."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["WithinStep", "between_steps"]


class WithinStep(KeyboardInterrupt):
    """An interruption that did not wait for the end of a step: what the model holds is no state of a run."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)  # a person's Ctrl-C; a cluster's notice before it kills


@contextmanager
def between_steps() -> Iterator[Callable[[], None]]:
    """Gives a function that raises KeyboardInterrupt if a signal has come; a second one raises WithinStep at once."""
    if threading.current_thread() is not threading.main_thread():  # Python hands signals to the main thread alone
        yield lambda: None
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came:
            raise WithinStep
        came.append(number)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield check
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
