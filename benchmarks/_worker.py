"""The far side of a `harness.Worker`: a peer in another environment, asked for one call at a time.

It needs the standard library only. A peer's script sets up, then hands its one call over:

    from _worker import serve
    serve(lambda: pipeline(prompt), figures=lambda: {"psnr_db": 41.2})
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("onnxruntime", "torch", "transformers", "diffusers", "optimum-onnx", "open-clip-torch", "numpy")


def serve(act: Callable[[], object], figures: Callable[[], Mapping[str, float]] = dict) -> None:
    """Answer each line on stdin with the seconds that one call took, until stdin closes; a last line holds the figures.

    Whatever libraries print goes to stderr, so that stdout carries the answers alone.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps({"versions": versions()}), file=answers)
    for line in sys.stdin:
        if line.strip() == "figures":
            print(json.dumps(dict(figures())), file=answers)
            continue
        started = time.perf_counter()
        act()
        print(json.dumps({"seconds": time.perf_counter() - started}), file=answers)


def versions() -> dict[str, str]:
    """What is installed on this side."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
