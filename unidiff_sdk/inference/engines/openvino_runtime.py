"""Graphs in OpenVINO. The only module that knows its package, devices and properties.

OpenVINO reads the graphs of the targets cpu and portable as they are, fp32 and int8. Its plugin for CPUs also computes
in bfloat16, on processors that have it (avx512_bf16, amx_bf16), from the same float32 weights.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.lifetimes import Owner, keep_in_child
from unidiff_sdk.errors import BundleError, OptionError, ProviderError
from unidiff_sdk.inference.manifest import Profile, TensorSpec

__all__ = ["OpenVinoSession", "create_openvino_session"]

PRECISIONS = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}  # and their names among the capabilities of a device
# The names of element types in OpenVINO and in NumPy, where they differ.
ELEMENT_TYPES = {
    "f32": "float32",
    "f16": "float16",
    "f64": "float64",
    "i32": "int32",
    "i64": "int64",
    "boolean": "bool",
}


class OpenVinoSession:
    """A graph that OpenVINO has compiled for a device.

    Args:
        compiled: the `openvino.CompiledModel`.
        provider: what runs it, such as "openvino:CPU, bf16".
        name: what the graph is called in messages.

    Attributes:
        inputs, outputs: their dtypes and shapes, by name.
        providers: `provider`, as the only one.
        captured: False.
    """

    captured = False

    def __init__(self, compiled: Any, *, provider: str, name: str = "the graph") -> None:
        self.inputs = {port.any_name: _tensor_spec(port) for port in compiled.inputs}
        self.outputs = {port.any_name: _tensor_spec(port) for port in compiled.outputs}
        self.providers = (provider,)
        self._compiled, self._name = compiled, name
        self._idle: list[Any] = []  # requests that no thread is using; each has its own memory
        self._owner = Owner("The graph")
        keep_in_child(self, "_compiled", "_idle")
        self._lock = threading.Lock()

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        self._owner.check()
        names = list(self.outputs if outputs is None else outputs)
        if missing := [name for name in names if name not in self.outputs]:
            raise BundleError(f"the graph has no output {', '.join(missing)}; it has {', '.join(self.outputs)}")
        self._check(feeds)
        with self._lock:
            request = self._idle.pop() if self._idle else None
        try:
            request = request or self._compiled.create_infer_request()
            request.infer({name: np.ascontiguousarray(array) for name, array in feeds.items()})
            # Copied, as the next call of this request writes into the same memory.
            results = {name: np.array(request.get_tensor(name).data) for name in names}
        except Exception as error:  # OpenVINO raises RuntimeError, and TypeError for names and dtypes
            raise BundleError(
                f"{self._name}: OpenVINO cannot run this graph ({_reason(error)}); use device='cpu', or fewer and "
                "smaller images at once if memory does not suffice"
            ) from error
        with self._lock:
            self._idle.append(request)
        return results

    def _check(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        """Raise BundleError for inputs that do not fit. OpenVINO converts or ignores them, and computes something."""
        if feeds.keys() != self.inputs.keys():
            raise BundleError(f"{self._name} has the inputs {', '.join(self.inputs)}, not {', '.join(feeds) or 'none'}")
        for name, spec in self.inputs.items():
            array = feeds[name]
            fits = len(array.shape) == len(spec.shape) and all(
                axis in ("?", side) for axis, side in zip(spec.shape, array.shape, strict=True)
            )
            if not fits or array.dtype != spec.dtype:
                raise BundleError(
                    f"{self._name}: {name} is {array.dtype}{list(array.shape)}; this graph needs "
                    f"{spec.dtype}{list(spec.shape)}"
                )


def create_openvino_session(
    file: Path,
    *,
    device: str,
    threads: int | None,
    profile: Profile | None,
    half: bool,
    fingerprint: str,
    capture: bool,
    precision: str | None,
    openvino: Any = None,
) -> OpenVinoSession:
    """Load a graph with OpenVINO: see `sessions.create_session` for arguments and errors.

    `profile`, `half`, `fingerprint` and `capture` concern GPUs of NVIDIA and are ignored. openvino is the module, in
    tests; by default the one that is installed, with one core for the whole process.
    """
    precision = precision or "f32"
    if precision not in PRECISIONS:
        raise OptionError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    core = _core() if openvino is None else openvino.Core()
    plugin = device.partition(":")[2] or "CPU"
    _require_device(core, plugin, precision)
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if plugin == "CPU" and threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = core.compile_model(core.read_model(str(file)), plugin, properties)
    except Exception as error:  # OpenVINO raises RuntimeError for files and for plugins
        raise BundleError(
            f"{file}: OpenVINO cannot load this graph on {plugin} ({_reason(error)}); use device='cpu', or export "
            "with --target cpu"
        ) from error
    return OpenVinoSession(compiled, provider=f"openvino:{plugin}, {precision}", name=str(file))


@cache
def _core() -> Any:
    """The one `openvino.Core` of this process, which is never destroyed.

    The first use of the CPU plugin of each core replaces the alternate signal stack of its thread, on processors with
    large registers. Destroying a core frees that stack, also if it is in use by then: the next signal, such as that of
    Ctrl-C, ends the process with a segmentation fault (seen with OpenVINO 2026 and several cores).
    """
    return _import_openvino().Core()


def _require_device(core: Any, plugin: str, precision: str) -> None:
    """Raise ProviderError if the device is missing, or does not compute in this precision but silently in another."""
    available = list(core.available_devices)
    if plugin.partition(".")[0] not in {name.partition(".")[0] for name in available}:
        raise ProviderError(f"OpenVINO finds no device {plugin!r}; this machine has {', '.join(available)}")
    if PRECISIONS[precision] not in core.get_property(plugin, "OPTIMIZATION_CAPABILITIES"):
        raise ProviderError(f"{plugin} does not compute in {precision}; use precision='f32'")


def _tensor_spec(port: Any) -> TensorSpec:
    """Of an input or output with dynamic axes: "?" for each of these."""
    element = port.element_type.get_type_name()
    axes = tuple("?" if axis.is_dynamic else axis.get_length() for axis in port.partial_shape)
    return TensorSpec(ELEMENT_TYPES.get(element, element), axes)


def _reason(error: Exception) -> str:
    """The last line of an error: OpenVINO's messages begin with places in its source code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise ProviderError("OpenVINO is not installed: pip install 'unidiff-sdk[openvino]'") from error
    return openvino
