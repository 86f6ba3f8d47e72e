"""What a figure depends on, to stand beside it: versions, processor, cores, date."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "unidiff-sdk",
    "onnxruntime",
    "onnxruntime-gpu",
    "qdrant-edge-py",
    "qdrant-client",
    "numpy",
    "tokenizers",
    "pillow",
    "torch",
    "diffusers",
)


def host() -> dict[str, object]:
    """The machine and the versions, for a result file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: installed for name in PACKAGES if (installed := version_of(name))},
    }


def processor() -> str:
    """The processor's name, from /proc/cpuinfo where there is one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def version_of(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
