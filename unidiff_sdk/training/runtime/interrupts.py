"""Deferred interrupts: a signal takes effect between two steps, so that the saved state is one of an unbroken run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["InterruptedWithinStep", "deferred_interrupts"]


class InterruptedWithinStep(KeyboardInterrupt):
    """A second interrupt stopped the run within a step. The state of the model must not be saved."""


SIGNALS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C; the notice of a cluster scheduler before it kills the process


@contextmanager
def deferred_interrupts(in_any: Callable[[bool], bool] = bool) -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if a signal has arrived. Call it between steps.

    in_any: Whether a condition holds in any process of the run. All of them then stop after the same step.

    A second signal raises InterruptedWithinStep immediately. Outside the main thread, where Python delivers no signals,
    the function does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    received: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if received:
            raise InterruptedWithinStep
        received.append(number)

    def raise_if_interrupted() -> None:
        if in_any(bool(received)):
            raise KeyboardInterrupt(*received)

    previous = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield raise_if_interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
