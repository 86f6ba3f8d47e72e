"""Graphs in ONNX Runtime. The only module that knows its packages, execution providers, session and run options."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.files import cache_folder
from unidiff_sdk._internal.lifetimes import Owner, keep_in_child
from unidiff_sdk.errors import BundleError, OptionError, ProviderError
from unidiff_sdk.inference.manifest import Profile, TensorSpec

__all__ = [
    "PROVIDERS",
    "OnnxSession",
    "avoid_saturation",
    "cached_engines",
    "create_onnx_session",
    "installed_packages",
    "saturates",
    "session_options",
    "tensorrt_version",
]

PROVIDERS: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""The execution providers of each device. The first one must load; the others run what it has no kernel for."""

ERRORS_ONLY = 3
OUT_OF_MEMORY = re.compile("alloc|out of memory", re.IGNORECASE)  # in ONNX Runtime's and CUDA's messages
TENSORRT_LIBRARY = "libnvinfer.so.10"  # the major version that ONNX Runtime links
CPUINFO = Path("/proc/cpuinfo")
SPIN_MICROSECONDS = "1000"  # ONNX Runtime before 1.32 may ignore it

Arrays = Mapping[str, NDArray[Any]]


# Calling a graph


class OnnxSession:
    """A graph that ONNX Runtime has loaded.

    Args:
        session: the `onnxruntime.InferenceSession`.
        onnxruntime: the module that made it.
        device: where buffers are allocated, in ONNX Runtime's terms: "cuda" or "cpu".
        buffered: for each input a shape, at which calls reuse one set of buffers on the device. None: no call does.
        capture: whether the session captures a CUDA graph, which calls at the buffered shapes replay.
        name: what the graph is called in messages.

    Attributes:
        inputs, outputs: their dtypes and shapes, by name.
        providers: the execution providers that loaded.
        captured: `capture`.
    """

    def __init__(
        self,
        session: Any,
        onnxruntime: Any,
        *,
        device: str = "cpu",
        buffered: Mapping[str, Sequence[int]] | None = None,
        capture: bool = False,
        name: str = "the graph",
    ) -> None:
        self.inputs = {value.name: _tensor_spec(value) for value in session.get_inputs()}
        self.outputs = {value.name: _tensor_spec(value) for value in session.get_outputs()}
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        self.captured = capture
        self._session, self._onnxruntime, self._device, self._name = session, onnxruntime, device, name
        self._buffered = None if buffered is None else {name: tuple(shape) for name, shape in buffered.items()}
        self._buffers: tuple[Any, dict[str, Any], dict[str, Any]] | None = None
        self._owner = Owner("The graph")
        keep_in_child(self, "_session", "_buffers")
        self._lock = threading.Lock()

    def run(self, feeds: Arrays, outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        self._owner.check()
        names = list(self.outputs if outputs is None else outputs)
        if not self.outputs.keys() >= set(names):
            missing = [name for name in names if name not in self.outputs]
            raise BundleError(f"the graph has no output {', '.join(missing)}; it has {', '.join(self.outputs)}")
        if self._buffered is not None and {name: array.shape for name, array in feeds.items()} == self._buffered:
            return self._run_buffered(feeds, names)
        with engine_errors(self._name):
            arrays = self._session.run(names, feeds, self._run_options(capture=False))
        return dict(zip(names, arrays, strict=True))

    def _run_buffered(self, feeds: Arrays, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        with self._lock, engine_errors(self._name):
            if self._buffers is None:
                self._buffers = self._allocate(feeds)
            binding, inputs, outputs = self._buffers
            for name, array in feeds.items():
                inputs[name].update_inplace(np.ascontiguousarray(array))
            self._session.run_with_iobinding(binding, self._run_options(capture=True))
            # Copied, as the next call writes into the same buffers.
            return {name: np.array(outputs[name].numpy()) for name in names}

    def _allocate(self, feeds: Arrays) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Buffers for inputs and outputs. One ordinary call tells the shapes of the outputs."""
        results = self._session.run(list(self.outputs), feeds, self._run_options(capture=False))
        on_device = self._onnxruntime.OrtValue.ortvalue_from_numpy
        inputs = {name: on_device(np.ascontiguousarray(array), self._device, 0) for name, array in feeds.items()}
        outputs = {name: on_device(array, self._device, 0) for name, array in zip(self.outputs, results, strict=True)}
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding, inputs, outputs

    def _run_options(self, *, capture: bool) -> Any:
        """For a session that captures: whether this call does. -1 is ONNX Runtime's id for calls that do not."""
        if not self.captured:
            return None
        options = self._onnxruntime.RunOptions()
        options.add_run_config_entry("gpu_graph_id", "1" if capture else "-1")
        return options


@contextmanager
def engine_errors(name: str) -> Iterator[None]:
    """Convert what ONNX Runtime raises in a call to a BundleError. Its exceptions have no common base class."""
    try:
        yield
    except Exception as error:
        fix = "export the bundle again"
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            fix = "memory does not suffice: use smaller images, or fewer at once"
        raise BundleError(f"{name}: ONNX Runtime cannot run this graph ({error}); {fix}") from error


def _tensor_spec(value: Any) -> TensorSpec:
    """Of `tensor(float)` with the shape ["batch", 4]: float32, ("batch", 4)."""
    names = {"float": "float32", "double": "float64"}
    dtype = value.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(names.get(dtype, dtype), tuple(axis if axis is not None else "?" for axis in value.shape))


# Loading a graph


def create_onnx_session(
    file: Path,
    *,
    device: str,
    threads: int | None,
    profile: Profile | None,
    half: bool,
    fingerprint: str,
    capture: bool,
    precision: str | None,
    onnxruntime: Any = None,
    find_tensorrt: Callable[[], str] | None = None,
) -> OnnxSession:
    """Load a graph with ONNX Runtime: see `create_session` for arguments and errors.

    onnxruntime is the module, find_tensorrt reports the version of TensorRT; by default those that are installed.
    """
    if precision is not None:
        raise OptionError(
            f"precision={precision!r} needs device='openvino' or 'auto'; on {device!r} it is that of the export "
            "(unidiff-export --fp16 or --int8)"
        )

    # 1. Is the provider of the device available?
    onnxruntime = onnxruntime or _import_onnxruntime()
    required, *_ = providers = PROVIDERS[device]
    available = onnxruntime.get_available_providers()
    if required not in available:
        raise ProviderError(f"{_cannot_use(device)}: this ONNX Runtime was built for {', '.join(available)} only")
    if device != "cpu":
        onnxruntime.preload_dlls()  # finds CUDA and cuDNN in the wheels that pip installed

    # 2. Options of the providers
    options: dict[str, dict[str, str]] = {}
    if capture:
        options["CUDAExecutionProvider"] = {"enable_cuda_graph": "1"}
    if device == "tensorrt":
        # Neither ONNX Runtime nor TensorRT reads what another version of either wrote.
        versions = f"onnxruntime-{onnxruntime.__version__}-tensorrt-{(find_tensorrt or tensorrt_version)()}"
        engines = cache_folder("tensorrt") / versions / f"{fingerprint[:16]}-{file.parent.name}"
        options["TensorrtExecutionProvider"] = _tensorrt_options(engines, profile, half)

    # 3. Load
    try:
        session = onnxruntime.InferenceSession(
            str(file),
            session_options(onnxruntime, threads),
            providers=[(name, options.get(name, {})) for name in providers if name in available],
            enable_fallback=0,  # otherwise a failure makes it continue without the device, now or in a later call
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base class
        if capture and "graph capture" in str(error).lower():
            # Some nodes (the search for a text's last token) have kernels for the CPU only: nothing to replay.
            return create_onnx_session(
                file,
                device=device,
                threads=threads,
                profile=profile,
                half=half,
                fingerprint=fingerprint,
                capture=False,
                precision=None,
                onnxruntime=onnxruntime,
            )
        if device != "cpu" and isinstance(error, (RuntimeError, ValueError)):  # of a provider, not of the file
            raise ProviderError(f"{_cannot_use(device)}: {error}") from error
        raise BundleError(f"{file}: ONNX Runtime cannot load this graph ({error})") from error
    if session.get_providers()[0] != required:
        # listed as available, but its libraries could not be loaded: ONNX Runtime then falls back without an error
        raise ProviderError(f"{_cannot_use(device)}: its libraries did not load")
    usual = {name: bounds["opt"] for name, bounds in profile.items()} if profile and device == "cuda" else None
    return OnnxSession(session, onnxruntime, device="cuda", buffered=usual, capture=capture, name=str(file))


def session_options(onnxruntime: Any, threads: int | None, cpuinfo: Path = CPUINFO) -> Any:
    """Options for a session that shares the processor with the other graphs of a bundle."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0  # 0: one for each core
    options.add_session_config_entry("session.load_model_format", "ONNX")  # not also its own format, by the content
    # Idle threads of one graph must not compete with the next graph's: text encoder, UNet, decoder take turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Between two operators of a call they wait for less. Without a limit, they slow down the loading of other graphs.
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
    avoid_saturation(options, cpuinfo)
    return options


def avoid_saturation(options: Any, cpuinfo: Path = CPUINFO) -> None:
    """Make a session multiply uint8 by uint8 instead of by int8, on a processor that `saturates`.

    Not on others: there it doubles the time of an int8 UNet.
    """
    if saturates(cpuinfo):
        options.add_session_config_entry("session.x64quantprecision", "1")


def saturates(cpuinfo: Path = CPUINFO) -> bool:
    """Whether the processor is an x86 without VNNI, on which sums of uint8 times int8 saturate at 16 bits.

    False where that cannot be read, as outside Linux.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])  # other processors have none
    return bool(flags) and not {"avx512_vnni", "avx_vnni"} & set(flags)


# TensorRT


def cached_engines() -> set[Path]:
    """The TensorRT engines in the user's cache."""
    return set(cache_folder("tensorrt").rglob("*.engine"))


def _tensorrt_options(engines: Path, profile: Profile | None, half: bool) -> dict[str, str]:
    """Options of the TensorRT provider. Without a profile it builds an engine again for each new shape."""
    try:
        engines.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProviderError(
            f"TensorRT's engines cannot be stored in {engines} ({error.strerror}); set XDG_CACHE_HOME to a writable "
            "folder"
        ) from error
    options = {
        "trt_fp16_enable": "1" if half else "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(engines),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(engines.parent),
    }
    if profile is not None:
        options |= {f"trt_profile_{bound}_shapes": _shapes_as_text(profile, bound) for bound in ("min", "opt", "max")}
    return options


def _shapes_as_text(profile: Profile, bound: str) -> str:
    """In the provider's format: `sample:2x4x64x64,timestep:2`."""

    def text(shape: Sequence[int]) -> str:
        return "x".join(map(str, shape))

    return ",".join(f"{name}:{text(bounds[bound])}" for name, bounds in profile.items())


def tensorrt_version(library: str = TENSORRT_LIBRARY) -> str:
    """Load TensorRT's library, and return its version, such as "101304". Raises ProviderError if it is missing."""
    with suppress(ImportError):  # pip's wheels lie outside the loader's path; their module loads them
        importlib.import_module("tensorrt")
    try:
        return str(ctypes.CDLL(library).getInferLibVersion())
    except OSError as error:
        raise ProviderError(f"{_cannot_use('tensorrt')}: {library} was not found") from error


# Packages


def _cannot_use(device: str) -> str:
    extra = "trt" if device == "tensorrt" else "gpu"
    return (
        f"device {device!r} is not available (it needs an NVIDIA driver and CUDA 13; for the rest: "
        f"pip uninstall -y onnxruntime && pip install 'unidiff-sdk[{extra}]'; device='cpu' always works)"
    )


def _import_onnxruntime() -> Any:
    """The module. An error tells how to install exactly one of the two packages that provide it."""
    installed = installed_packages()
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
        # the folder that remains when one of two overlapping packages was removed
        raise ProviderError("onnxruntime is incomplete: pip install --force-reinstall 'unidiff-sdk[cpu]'   (or [gpu])")
    return onnxruntime


def installed_packages() -> list[str]:
    """Which of the two packages lie where `import onnxruntime` looks.

    Read from the folder itself: importing importlib.metadata costs as much as ONNX Runtime itself.
    """
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        return []
    site_packages = Path(next(iter(spec.submodule_search_locations))).parent
    records = {record.name.split("-")[0] for record in site_packages.glob("onnxruntime*.dist-info")}
    return [name for name in ("onnxruntime", "onnxruntime-gpu") if name.replace("-", "_") in records]
