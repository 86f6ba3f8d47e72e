"""The device "auto": for each graph, the engine for CPUs that was measured to be faster on this processor.

    $XDG_CACHE_HOME/unidiff-sdk/auto/FINGERPRINT-GRAPH-KEY.json

When a graph is first used, OpenVINO and ONNX Runtime run it in turns. This also shows whether OpenVINO computes what
ONNX Runtime computes in float32. The result is kept for this bundle, processor, number of threads and versions of the
engines; later, only the chosen engine loads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.files import cache_folder, write_atomically
from unidiff_sdk._internal.json_values import is_finite_number, read_json
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import BundleError, ProviderError, StoreError
from unidiff_sdk.inference.manifest import Profile

from .onnx_runtime import CPUINFO, create_onnx_session, installed_packages
from .openvino_runtime import create_openvino_session

if TYPE_CHECKING:
    from unidiff_sdk.inference.sessions import Session, SessionFactory

__all__ = ["ChosenSession", "Comparison", "Record", "compare", "create_auto_session", "processor"]

MIN_COSINE = 0.999
"""The smallest cosine between an output and that of ONNX Runtime: the limit of exports in half precision."""

ROUNDS, BUDGET_S = 5, 3.0  # after that time, no round starts
LARGEST_BATCH = 4  # more images in a call take longer to measure, and the engines compare in the same way
TIMESTEP = 500.0  # of the usual 1,000
MAX_RECORD = 1 << 16  # bytes
# Identify a processor in /proc/cpuinfo; other lines, such as the frequency, change.
IDENTITY = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "Features")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Comparison:
    """OpenVINO compared with ONNX Runtime, for one graph.

    Attributes:
        ratio: time of a call, relative to that of ONNX Runtime.
        cosine: the smallest cosine between an output and that of ONNX Runtime; 0 if one of them is not finite.
    """

    ratio: float
    cosine: float


class ChosenSession:
    """The session of the chosen engine. Its `providers` also state the reason."""

    def __init__(self, session: Session, reason: str) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        provider, *others = session.providers
        self.providers, self.captured = (f"{provider} (auto: {reason})", *others), session.captured
        self._session = session

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        return self._session.run(feeds, outputs)


# Choosing


def create_auto_session(
    file: Path,
    *,
    device: str,
    threads: int | None,
    profile: Profile | None,
    half: bool,
    fingerprint: str,
    capture: bool,
    precision: str | None,
    onnx_engine: SessionFactory = create_onnx_session,
    openvino_engine: SessionFactory = create_openvino_session,
    clock: Callable[[], float] = time.perf_counter,
) -> Session:
    """Load a graph with ONNX Runtime or OpenVINO: see `sessions.create_session` for arguments and errors.

    In f32 the faster engine is chosen; OpenVINO only if it computes what ONNX Runtime computes. In bf16 and f16, which
    only OpenVINO has, results that are too far from those in float32 are a BundleError.

    The last three arguments are for tests; by default the installed engines are measured.
    """
    precision = precision or "f32"
    options: dict[str, Any] = {"threads": threads, "profile": profile, "half": half, "capture": capture}
    load = {
        device: partial(engine, file, device=device, precision=computed, fingerprint=fingerprint, **options)
        for device, engine, computed in (("cpu", onnx_engine, None), ("openvino", openvino_engine, precision))
    }
    if precision == "f32" and (profile is None or find_spec("openvino") is None):
        return load["cpu"]()
    record = Record(file, fingerprint, precision, threads)
    sessions: dict[str, Session] = {}
    comparison = record.read()
    if comparison is None:
        try:
            for name in ("openvino", "cpu"):
                sessions[name] = load[name]()
            comparison = compare(sessions["openvino"], sessions["cpu"], _example_inputs(file, sessions, profile), clock)
        except (BundleError, ProviderError):
            if precision != "f32":
                raise
            return ChosenSession(sessions.get("cpu") or load["cpu"](), "openvino cannot run this graph")
        record.write(comparison)
    chosen, reason = _choose(comparison, precision, file)
    return ChosenSession(sessions.get(chosen) or load[chosen](), reason)


def _choose(comparison: Comparison, precision: str, file: Path) -> tuple[str, str]:
    """The device of the better engine, and the reason. Raises BundleError if half precision is too coarse."""
    ratio, cosine = comparison.ratio, comparison.cosine
    if precision != "f32":
        if cosine < MIN_COSINE:
            raise BundleError(
                f"{file}: diverges from f32 in {precision}: cosine {cosine:.4f}, required ≥ {MIN_COSINE}; use "
                "precision='f32'"
            )
        return "openvino", f"{ratio:.2f} of the time of cpu, cosine {cosine:.5f}"
    if cosine < MIN_COSINE:
        return "cpu", f"openvino diverges, cosine {cosine:.4f}"
    if ratio < 1:
        return "openvino", f"{ratio:.2f} of the time of cpu"
    return "cpu", f"{1 / ratio:.2f} of the time of openvino"


# Measuring


def compare(candidate: Session, baseline: Session, feeds: Arrays, clock: Callable[[], float]) -> Comparison:
    """Call two sessions in turns, and compare their outputs and their fastest calls.

    The first calls take longer: they allocate memory and compile kernels.

    Raises:
        BundleError: a session cannot run these inputs.
    """
    fastest = [math.inf, math.inf]
    ends = clock() + BUDGET_S
    for _ in range(ROUNDS):
        results = []
        for k, session in enumerate((candidate, baseline)):
            started = clock()
            results.append(session.run(feeds))
            fastest[k] = min(fastest[k], clock() - started)
        if clock() > ends:
            break
    found, expected = results
    return Comparison(fastest[0] / fastest[1], min(_cosine(found[name], array) for name, array in expected.items()))


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    x, y = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return 0.0
    return float(x @ y / max(np.linalg.norm(x) * np.linalg.norm(y), np.finfo(np.float64).tiny))


def _example_inputs(file: Path, sessions: Mapping[str, Session], profile: Profile | None) -> Arrays:
    """Random inputs of the usual sizes. Raises BundleError if these are unknown."""
    if profile is None:
        raise BundleError(
            f"{file}: the usual sizes of its inputs are unknown, so that half precision cannot be compared with f32; "
            "use device='openvino'"
        )
    rng = np.random.default_rng(0)
    feeds: Arrays = {}
    for name, spec in sessions["cpu"].inputs.items():
        batch, *sides = profile[name]["opt"]
        shape = (min(batch, LARGEST_BATCH), *sides)[: len(spec.shape)]  # other exporters' timestep is a scalar
        array: NDArray[Any]
        if name == "input_ids":
            array = rng.integers(1, 256, shape)  # the bytes, which all vocabularies have
        elif name == "timestep":
            array = np.full(shape, TIMESTEP)
        else:
            array = rng.normal(size=shape) if spec.dtype.startswith("float") else np.ones(shape)
        feeds[name] = array.astype(spec.dtype)
    return feeds


# Keeping the result


class Record:
    """Where the comparison of a graph is kept.

    Args:
        file: the graph.
        fingerprint: of its bundle. "": nothing is kept, as the graph may change.
        precision: that OpenVINO computes in.
        threads: of a call. None: one for each core.
    """

    def __init__(self, file: Path, fingerprint: str, precision: str, threads: int | None) -> None:
        self._key = {
            "fingerprint": fingerprint,
            "graph": file.parent.name,
            "precision": precision,
            "processor": processor(),
            "threads": threads or os.cpu_count(),
            "versions": {name: _version(name) for name in (*installed_packages(), "openvino")},
        }
        digest = hashlib.sha256(json.dumps(self._key).encode()).hexdigest()[:16]
        self._path = cache_folder("auto") / f"{fingerprint[:16]}-{file.parent.name}-{digest}.json"

    def read(self) -> Comparison | None:
        """What an earlier session has measured. None if there is nothing, or it is damaged."""
        if not self._key["fingerprint"]:
            return None
        try:
            found = read_json(self._path, error=StoreError, max_size=MAX_RECORD)
        except StoreError:
            return None
        ratio, cosine = found.get("ratio"), found.get("cosine")
        if found.get("key") != self._key or not (is_finite_number(ratio) and is_finite_number(cosine)) or ratio <= 0:
            return None
        return Comparison(ratio, cosine)

    def write(self, comparison: Comparison) -> None:
        """Keep a comparison. Warns, once in a process, if that is not possible."""
        if not self._key["fingerprint"]:
            return
        content = {"key": self._key, **asdict(comparison)}
        try:
            write_atomically(self._path, json.dumps(content, indent=1).encode())
        except StoreError:
            _warn_unwritable(self._path.parent)


@cache
def _warn_unwritable(folder: Path) -> None:
    """Warn, once in a process."""
    warn(
        f"{folder} cannot be written, so device='auto' measures the engines in each process again; set XDG_CACHE_HOME "
        "to a writable folder"
    )


def processor(cpuinfo: Path = CPUINFO) -> str:
    """The family of the processor and its instructions, as far as the system states them."""
    try:
        first, *_ = cpuinfo.read_text(encoding="utf-8", errors="replace").split("\n\n", maxsplit=1)  # core
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(line for line in first.splitlines() if line.partition(":")[0].strip() in IDENTITY)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version  # takes long to import

    try:
        return version(package)
    except PackageNotFoundError:
        return None
