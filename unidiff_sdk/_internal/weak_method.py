"""Methods that can be kept without keeping their object."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["weak_method"]

P = ParamSpec("P")
T = TypeVar("T")


def weak_method(method: Callable[P, T]) -> Callable[P, T]:
    """A bound method that does not hold its object, for an attribute of that object to hold.

    Otherwise the two make a cycle, and what the object holds, such as graphs, stays in memory until the collector comes
    by, which does not see its size.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = reference()
        assert bound is not None  # who calls holds the object
        return bound(*args, **kwargs)

    return call
