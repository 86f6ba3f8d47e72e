"""Record what a figure depends on: versions, processor, cores, date."""

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
CPUINFO = Path("/proc/cpuinfo")
# By the flag in /proc/cpuinfo, widest first.
ARITHMETIC = {
    "amx_int8": "AMX",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX-VNNI",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
}


def host() -> dict[str, object]:
    """Return the machine and the versions for a result file."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: installed for name in PACKAGES if (installed := version_of(name))},
    }


def processor(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's name and its widest vector arithmetic, as far as /proc/cpuinfo lists them.

    Virtual machines use one name for several generations of processors, and the speed of int8 depends on the
    arithmetic.
    """
    entries = _entries(cpuinfo)
    if not entries:
        return platform.processor() or platform.machine()
    flags = entries.get("flags", "").split()
    widest = next((f", {name}" for flag, name in ARITHMETIC.items() if flag in flags), "")
    return entries.get("model name", platform.machine()) + widest


def computes_bf16(cpuinfo: Path = CPUINFO) -> bool:
    """Return whether the processor multiplies bfloat16, so that OpenVINO accepts it."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_entries(cpuinfo).get("flags", "").split())


def _entries(cpuinfo: Path) -> dict[str, str]:
    """Return the entries of the last processor; none if there is no such file."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def version_of(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
