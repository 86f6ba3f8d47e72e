"""A session is a graph that is ready to run. What that takes, whichever engine runs it, and how one is created."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from unidiff_sdk.errors import OptionError

from .engines.auto import create_auto_session
from .engines.onnx_runtime import PROVIDERS, cached_engines, create_onnx_session
from .engines.openvino_runtime import create_openvino_session
from .manifest import Profile, TensorSpec
from .shape_profiles import ProfiledSession

__all__ = [
    "DEVICES",
    "ENGINES",
    "GraphWarmup",
    "Session",
    "SessionFactory",
    "create_session",
    "engine_of",
    "warm_up",
]


class Session(Protocol):
    """A graph that is ready to run. May be shared between threads."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each input."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of each output."""

    @property
    def providers(self) -> tuple[str, ...]:
        """What runs it, in the engine's terms; the first one runs most of it."""

    @property
    def captured(self) -> bool:
        """Whether calls at the usual shapes replay a CUDA graph."""

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Compute outputs, by default all of them, from an array for each input. The arrays belong to the caller.

        Raises:
            BundleError: the graph has no such output.
        """


class SessionFactory(Protocol):
    """Loads graphs, as `create_session` does."""

    def __call__(
        self,
        file: Path,
        *,
        device: str,
        threads: int | None,
        profile: Profile | None,
        half: bool,
        fingerprint: str,
        capture: bool,
        precision: str | None,
    ) -> Session: ...


ENGINES: dict[str, SessionFactory] = dict.fromkeys(PROVIDERS, create_onnx_session) | {
    "openvino": create_openvino_session,
    "auto": create_auto_session,
}
DEVICES = tuple(ENGINES)
"""The devices that graphs run on. Another engine adds its own to `ENGINES`."""


def engine_of(device: str) -> str:
    """The key in `ENGINES` of a device: "openvino" of "openvino:GPU". Raises OptionError for an unknown one."""
    engine, colon, plugin = device.partition(":") if isinstance(device, str) else (device, "", "")
    if engine not in DEVICES or (colon and (engine != "openvino" or not plugin)):
        raise OptionError(f"device is {device!r}; use one of {', '.join(DEVICES)}, openvino:GPU or openvino:NPU")
    return engine


def create_session(
    file: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    profile: Profile | None = None,
    half: bool = False,
    fingerprint: str = "",
    capture: bool = False,
    precision: str | None = None,
) -> Session:
    """Load an ONNX graph on a device.

    Args:
        file: the `.onnx` file.
        device: "cpu", "cuda" or "tensorrt"; "openvino" (its CPU plugin), "openvino:GPU" or "openvino:NPU"; or "auto":
            "cpu" or "openvino", whichever is faster.
        threads: number of threads for one call on the CPU. None: one for each core.
        profile: the shapes that the graph is used at, for buffers and engines on a GPU.
        half: whether TensorRT may compute in half precision.
        fingerprint: of the bundle; keeps what is cached for it, TensorRT's engines and the choices of "auto", apart.
        capture: for "cuda", replay calls at the profile's usual shapes from a CUDA graph, where all nodes run on it.
        precision: for "openvino" and "auto", the precision of the computation: "f32", "bf16" or "f16". None: "f32".
            Layers that an int8 graph quantizes stay int8.

    Raises:
        OptionError: the device is unknown, `threads` is not positive, or another option is not for this device.
        ProviderError: the engine is not installed properly, or the device did not load or does not compute that way.
        BundleError: the file cannot be loaded; or with "auto", its results in half precision differ too much.
    """
    engine = engine_of(device)
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; give at least 1, or None for one per core")
    if capture and (device != "cuda" or profile is None):
        raise OptionError(f"capture=True needs device='cuda' and a bundle of unidiff-export; the device is {device!r}")
    session = ENGINES[engine](
        file,
        device=device,
        threads=threads,
        profile=profile,
        half=half,
        fingerprint=fingerprint,
        capture=capture,
        precision=precision,
    )
    return ProfiledSession(session, profile) if device == "tensorrt" and profile is not None else session


# Warm-up


@dataclass(frozen=True)
class GraphWarmup:
    """How one graph started.

    Attributes:
        graph: its name.
        providers: the execution providers that loaded; the first one runs the graph.
        load_seconds: to read the file; also to build TensorRT's engine or read it from the cache, and with "auto" to
            measure the engines the first time.
        first_seconds: the first call, at the usual shapes.
        next_seconds: the call after it.
        engines_built: number of TensorRT engines that were not in the cache.
        captured: whether calls at the usual shapes replay a CUDA graph.
    """

    graph: str
    providers: tuple[str, ...]
    load_seconds: float
    first_seconds: float
    next_seconds: float
    engines_built: int
    captured: bool


def warm_up(graph: str, load: Callable[[], Session], feeds: Mapping[str, NDArray[Any]]) -> GraphWarmup:
    """Load a graph and call it twice: the first call allocates memory and tunes kernels."""
    engines = cached_engines()
    started = time.perf_counter()
    session = load()
    loaded = time.perf_counter()
    session.run(feeds)
    first = time.perf_counter()
    session.run(feeds)
    second = time.perf_counter()
    return GraphWarmup(
        graph=graph,
        providers=session.providers,
        load_seconds=loaded - started,
        first_seconds=first - loaded,
        next_seconds=second - first,
        engines_built=len(cached_engines() - engines),
        captured=session.captured,
    )
