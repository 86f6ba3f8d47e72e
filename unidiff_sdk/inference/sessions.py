"""ONNX Runtime sessions. The only file that knows its packages, execution providers and session options."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from unidiff_sdk.errors import BundleError, OptionError, ProviderError

from .manifest import Profile

__all__ = ["DEVICES", "GraphWarmup", "avoid_saturation", "cache_folder", "create_session", "saturates", "warm_up"]

DEVICES: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""For each device, its execution providers: first the one that must load, then those that take what it cannot run."""

_ERRORS_ONLY = 3
_TENSORRT_LIBRARY = "libnvinfer.so.10"  # the major version that ONNX Runtime links


def create_session(
    file: Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    profile: Profile | None = None,
    half: bool = False,
    fingerprint: str = "",
    capture: bool = False,
) -> Any:
    """Load an ONNX graph: an `onnxruntime.InferenceSession`, or what stands in for it, on the device.

    Args:
        file: the `.onnx` file.
        device: "cpu", "cuda" or "tensorrt".
        threads: how many threads one call uses on the CPU; by default one for each core.
        profile: the shapes that the graph is used at, for a GPU's buffers and engines.
        half: whether TensorRT may compute in half precision.
        fingerprint: of the bundle, so that its engines are told from those of others.
        capture: for "cuda", replay calls of the profile's usual shapes from a CUDA graph, where all nodes run on it.

    Raises:
        OptionError: there is no such device, `threads` is not positive, or `capture` is not for this device.
        ProviderError: ONNX Runtime is not installed properly, or the device did not load.
        BundleError: ONNX Runtime cannot read the file.
    """
    if device not in DEVICES:
        raise OptionError(f"device {device!r} is not known; use one of {', '.join(DEVICES)}")
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; give at least 1, or None for one a core")
    if capture and (device != "cuda" or profile is None):
        raise OptionError(f"capture=True is for device='cuda' and a bundle of unidiff-export, not for {device!r}")

    # 1. Is the device's provider there?
    onnxruntime = _import_onnxruntime()
    wanted, *_ = providers = DEVICES[device]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise ProviderError(f"{_cannot_use(device)}: this ONNX Runtime was built for {', '.join(available)} only")
    if device != "cpu":
        onnxruntime.preload_dlls()  # finds CUDA and cuDNN in the wheels that pip put beside it

    # 2. What each provider is told
    told: dict[str, dict[str, str]] = {}
    if capture:
        told["CUDAExecutionProvider"] = {"enable_cuda_graph": "1"}
    if device == "tensorrt":
        # Neither ONNX Runtime nor TensorRT reads what another version of either wrote.
        versions = f"onnxruntime-{onnxruntime.__version__}-tensorrt-{_load_tensorrt()}"
        engines = cache_folder() / versions / f"{fingerprint[:16]}-{file.parent.name}"
        told["TensorrtExecutionProvider"] = _tensorrt_options(engines, profile, half)

    # 3. Load
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0  # 0: one a core
    # Idle threads of one graph must not compete with the next graph's: text encoder, UNet, decoder take turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    avoid_saturation(options)
    try:
        session = onnxruntime.InferenceSession(
            str(file),
            options,
            providers=[(name, told.get(name, {})) for name in providers if name in available],
            enable_fallback=0,  # or it goes on without the device after a failure, then or in any later call
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        if capture and "graph capture" in str(error).lower():
            # Some nodes (the search for a text's last token) have kernels for the CPU only: nothing to replay.
            return create_session(file, device=device, threads=threads, profile=profile)
        if device != "cpu" and isinstance(error, (RuntimeError, ValueError)):  # of a provider, not of the file
            raise ProviderError(f"{_cannot_use(device)}: {error}") from error
        raise BundleError(f"{file}: ONNX Runtime cannot load this graph ({error})") from error
    if session.get_providers()[0] != wanted:
        # listed as available, yet its libraries could not be loaded: ONNX Runtime then falls back without an error
        raise ProviderError(f"{_cannot_use(device)}: its libraries did not load")

    # 4. How it is called
    return _called_for(device, session, onnxruntime, profile, capture)


def _called_for(device: str, session: Any, onnxruntime: Any, profile: Profile | None, capture: bool) -> Any:
    """The session itself, or around it what makes its calls fit the device."""
    if device == "cpu" or profile is None:
        return session
    from .gpu import BoundSession, ProfiledSession

    if device == "tensorrt":
        return ProfiledSession(session, profile)
    usual = {name: bounds["opt"] for name, bounds in profile.items()}
    return BoundSession(session, onnxruntime, usual, device="cuda", capture=capture)


# Warm-up


@dataclass(frozen=True)
class GraphWarmup:
    """How one graph started.

    Attributes:
        graph: its name.
        providers: the execution providers that loaded; the first one runs the graph.
        load_seconds: to read the file and, with TensorRT, to build the engine or to read it from the cache.
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


def warm_up(graph: str, load: Callable[[], Any], inputs: Mapping[str, NDArray[Any]]) -> GraphWarmup:
    """Load a graph and call it twice: the first call allocates memory and tunes kernels."""
    engines = _cached_engines()
    started = time.perf_counter()
    session = load()
    loaded = time.perf_counter()
    session.run(None, inputs)
    first = time.perf_counter()
    session.run(None, inputs)
    second = time.perf_counter()
    return GraphWarmup(
        graph=graph,
        providers=tuple(session.get_providers()),
        load_seconds=loaded - started,
        first_seconds=first - loaded,
        next_seconds=second - first,
        engines_built=len(_cached_engines() - engines),
        captured=getattr(session, "captured", False),
    )


def _cached_engines() -> set[Path]:
    return set(cache_folder().rglob("*.engine"))


# TensorRT


def cache_folder() -> Path:
    """Where TensorRT's engines and timings are kept, in a folder for each pair of versions."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "unidiff-sdk" / "tensorrt"


def _tensorrt_options(engines: Path, profile: Profile | None, half: bool) -> dict[str, str]:
    """Options of the TensorRT provider. Without a profile it builds an engine anew for shapes that it has not met."""
    try:
        engines.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProviderError(
            f"TensorRT's engines cannot be kept in {engines} ({error.strerror}); set XDG_CACHE_HOME to a folder that "
            "can be written"
        ) from error
    told = {
        "trt_fp16_enable": "1" if half else "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(engines.parent),
    }
    if profile is not None:
        told |= {f"trt_profile_{bound}_shapes": _shapes_as_text(profile, bound) for bound in ("min", "opt", "max")}
    return told


def _shapes_as_text(profile: Profile, bound: str) -> str:
    """As the provider reads them: `sample:2x4x64x64,timestep:2`."""

    def text(shape: Sequence[int]) -> str:
        return "x".join(map(str, shape))

    return ",".join(f"{name}:{text(bounds[bound])}" for name, bounds in profile.items())


def _load_tensorrt() -> str:
    """Load TensorRT's library, wherever it was installed, and return its version, such as "101304"."""
    with suppress(ImportError):  # pip's wheels lie outside the loader's path; their module loads them
        importlib.import_module("tensorrt")
    try:
        return str(ctypes.CDLL(_TENSORRT_LIBRARY).getInferLibVersion())
    except OSError as error:
        raise ProviderError(f"{_cannot_use('tensorrt')}: {_TENSORRT_LIBRARY} was not found") from error


# Packages


def _cannot_use(device: str) -> str:
    return (
        f"device {device!r} cannot be used (an NVIDIA driver and CUDA 13 are needed; pip uninstall -y onnxruntime && "
        f"pip install 'unidiff-sdk[{'trt' if device == 'tensorrt' else 'gpu'}]' brings the rest; device='cpu' always "
        "works)"
    )


def avoid_saturation(options: Any) -> None:
    """Have the session of these options multiply uint8 by uint8 instead of by int8 on a processor that `saturates`.

    Not on others: there it doubles the time of an int8 UNet.
    """
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")


def saturates(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor is an x86 without VNNI, on which sums of uint8 times int8 saturate at 16 bits.

    Where that cannot be seen, outside Linux, it is taken not to be.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])  # other processors have none
    return bool(flags) and not {"avx512_vnni", "avx_vnni"} & set(flags)


def _import_onnxruntime() -> Any:
    """The module; or a sentence on how to get exactly one of the two packages that provide it."""
    installed = _installed_packages()
    if len(installed) > 1:
        raise ProviderError(
            f"{' and '.join(installed)} are both installed and overwrite each other's files; keep one of them: "
            f"pip uninstall -y {' '.join(installed)} && pip install 'unidiff-sdk[cpu]'   (or [gpu])"
        )
    try:
        import onnxruntime
    except ImportError as error:
        if not installed:
            raise ProviderError("ONNX Runtime is not installed: pip install 'unidiff-sdk[cpu]'   (or [gpu])") from error
        raise ProviderError(
            f"{installed[0]} cannot be imported ({error}): pip install --force-reinstall {installed[0]}"
        ) from error
    if not hasattr(onnxruntime, "InferenceSession"):
        # the folder that is left when one of two overlapping packages was removed
        raise ProviderError("onnxruntime is incomplete: pip install --force-reinstall 'unidiff-sdk[cpu]'   (or [gpu])")
    return onnxruntime


def _installed_packages() -> list[str]:
    """Which of the two packages lie where `import onnxruntime` would look.

    Read from the folder itself: importing importlib.metadata costs as much as ONNX Runtime itself.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        return []
    site_packages = Path(next(iter(spec.submodule_search_locations))).parent
    records = {record.name.split("-")[0] for record in site_packages.glob("onnxruntime*.dist-info")}
    return [name for name in ("onnxruntime", "onnxruntime-gpu") if name.replace("-", "_") in records]
