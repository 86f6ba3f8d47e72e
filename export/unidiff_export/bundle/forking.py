"""Run a call in a forked process, beside this one. It shares the memory of this one, so that models are not copied."""

from __future__ import annotations

import io
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TypeVar

import torch

from unidiff_sdk.errors import ExportError

T = TypeVar("T")


@contextmanager
def forked(call: Callable[[], T]) -> Iterator[Callable[[], T]]:
    """Run `call` in a forked process, which ends with the block. Yields a function that waits for its result.

    That function raises the error of `call`, or ExportError if the process was killed, as it is without memory. The
    process computes on one core: the threads of PyTorch do not exist there. Other threads of this process must not hold
    locks that `call` needs.
    """
    fork = multiprocessing.get_context("fork")
    answers, answer = fork.Pipe(duplex=False)
    process = fork.Process(target=_child, args=(call, answer), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, about other threads
        process.start()
    answer.close()  # the child has its own; with this one, the end of the child would not end `recv`

    def result() -> T:
        try:
            value, error = answers.recv()
        except EOFError:
            process.join()
            raise ExportError(f"A process that wrote graphs ended with exit code {process.exitcode}.") from None
        if error is not None:
            raise error
        done: T = value
        return done

    try:
        yield result
    finally:
        process.kill()
        process.join()
        answers.close()


def _child(call: Callable[[], object], answer: Connection) -> None:
    sys.stdout = sys.stderr = io.StringIO()  # a thread of the parent may have held their locks
    torch.set_num_threads(1)
    value, error = None, None
    try:
        value = call()
    except Exception as raised:  # the parent raises it
        error = raised
    answer.send((value, error))
