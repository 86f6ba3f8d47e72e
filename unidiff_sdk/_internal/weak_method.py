"""Bound methods that do not keep their object alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["weak_method"]

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
