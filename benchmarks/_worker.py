"""The process behind a `harness.Worker`: a peer in another environment that performs one call per request.

This module uses only the standard library. A peer's script sets up, then passes its call to `serve`:

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
    """Perform one call for each line on stdin and answer with its seconds; answer the line `figures` with the figures.

    Libraries' output goes to stderr, so that stdout carries only the answers. Returns when stdin closes.
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
    """Return the installed versions in this environment."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
