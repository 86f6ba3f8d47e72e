"""Lifetimes: bound methods that do not keep their object alive, and objects that belong to one process.

A forked child has a copy of every object, but neither the threads nor the locks of engines. Using such a copy hangs or
changes the files of the parent; so does destroying it.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ParamSpec, TypeVar

from unidiff_sdk.errors import StoreError

__all__ = ["Owner", "close_in_child", "finalize_in_owner", "keep_in_child", "weak_method"]

P = ParamSpec("P")
T = TypeVar("T")


def weak_method(method: Callable[P, T]) -> Callable[P, T]:
    """Return a bound method that holds its object weakly, for storing as an attribute of that object.

    A plain bound method would make a reference cycle. What the object holds, such as ONNX graphs, would then stay in
    memory until the garbage collector runs, which does not know how large it is.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = reference()
        assert bound is not None  # the caller holds the object
        return bound(*args, **kwargs)

    return call


class Owner:
    """The process that opened an object.

    Args:
        name: the object, as the subject of a sentence.
    """

    def __init__(self, name: str) -> None:
        self._name, self._process = name, os.getpid()

    @property
    def is_current(self) -> bool:
        """Whether this process opened the object."""
        return self._process == os.getpid()

    def check(self) -> None:
        """Raise StoreError in a forked child. Call it before waiting for a lock, which a lost thread may hold."""
        if not self.is_current:
            raise StoreError(
                f"{self._name} was opened by process {self._process} and cannot be used in its forked child "
                f"{os.getpid()}. Open it in the child, after the fork."
            )


def finalize_in_owner(target: object, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """As `weakref.finalize`, but a forked child does not call `function`, neither early nor at its exit."""
    owner = Owner("")
    return weakref.finalize(target, lambda: function(*args, **kwargs) if owner.is_current else None)


_has_engines = False  # whether this process has ever opened one
_kept: weakref.WeakKeyDictionary[Any, tuple[str, ...]] = weakref.WeakKeyDictionary()


def keep_in_child(target: object, *attributes: str) -> None:
    """Never destroy the values of attributes in a forked child: engines would wait there for threads that are gone.

    The same holds for what engines destroy at the exit of a process: a forked child skips it (`_skip_exit_handlers`).
    """
    global _has_engines
    _has_engines = True
    _kept[target] = attributes


_closed: weakref.WeakKeyDictionary[IO[Any], str] = weakref.WeakKeyDictionary()
_OPEN_FILES = "/proc/self/fd"  # Linux


def close_in_child(lock: IO[Any], folder: Path) -> None:
    """Close a lock file in a forked child, and on Linux also the files below `folder` that an engine has open.

    The child would otherwise keep their locks after the parent has closed them or ended. Memory maps stay valid.
    """
    _closed[lock] = os.path.realpath(folder) + os.sep


def _close_all() -> None:
    folders = tuple(folder for lock, folder in list(_closed.items()) if not lock.closed)
    for lock in list(_closed):
        lock.close()
    if not folders or not os.path.isdir(_OPEN_FILES):
        return
    for name in os.listdir(_OPEN_FILES):
        try:
            if os.readlink(f"{_OPEN_FILES}/{name}").startswith(folders):
                os.close(int(name))
        except FileNotFoundError:  # the one that listed the folder
            continue


def _skip_exit_handlers() -> None:
    """End this process without the exit handlers of libraries that are loaded, among them the destructors of engines.

    `on_exit` of the GNU C library calls the handler that was registered last first, with the status of the process. The
    interpreter has ended regularly by then, so Python's own exit handlers have run and its files are flushed.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):
        library.on_exit(ctypes.cast(library._exit, ctypes.c_void_p), None)


def _after_fork() -> None:
    _close_all()
    if _has_engines:
        _skip_exit_handlers()
    for target, attributes in list(_kept.items()):
        for name in attributes:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(getattr(target, name, None)))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
