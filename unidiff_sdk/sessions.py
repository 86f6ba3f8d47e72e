"""ONNX Runtime sessions. The only file that knows its packages, execution providers and session options."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .errors import BundleError, OptionError, ProviderError

__all__ = ["DEVICES", "create_session"]

DEVICES: dict[str, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
"""For each device, its execution providers: first the one that must load, then those that take what it cannot run."""

_ERRORS_ONLY = 3


def create_session(file: Path, *, device: str = "cpu", threads: int | None = None) -> Any:
    """Load an ONNX graph: an `onnxruntime.InferenceSession` whose first provider is the device's.

    Args:
        file: the `.onnx` file.
        device: "cpu", "cuda" or "tensorrt".
        threads: how many threads one call uses on the CPU; by default one for each core.

    Raises:
        OptionError: there is no such device, or `threads` is not positive.
        ProviderError: ONNX Runtime is not installed properly, or the device did not load.
        BundleError: ONNX Runtime cannot read the file.
    """
    if device not in DEVICES:
        raise OptionError(f"device {device!r} is not known; use one of {', '.join(DEVICES)}")
    if threads is not None and threads < 1:
        raise OptionError(f"threads is {threads}; give at least 1, or None for one a core")
    onnxruntime = _import_onnxruntime()
    wanted, *_ = providers = DEVICES[device]
    available = onnxruntime.get_available_providers()
    if wanted not in available:
        raise ProviderError(f"{_cannot_use(device)}: this ONNX Runtime was built for {', '.join(available)} only")
    if device != "cpu":
        onnxruntime.preload_dlls()  # finds CUDA and cuDNN in the wheels that pip put beside it
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = threads or 0  # 0: one a core
    # Idle threads of one graph must not compete with the next graph's: text encoder, UNet, decoder take turns.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(
            str(file), options, providers=[name for name in providers if name in available]
        )
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        raise BundleError(f"{file}: ONNX Runtime cannot load this graph ({error})") from error
    if session.get_providers()[0] != wanted:
        # listed as available, yet its libraries could not be loaded: ONNX Runtime then falls back without an error
        raise ProviderError(f"{_cannot_use(device)}: its libraries did not load")
    return session


def _cannot_use(device: str) -> str:
    return (
        f"device {device!r} cannot be used (an NVIDIA driver and CUDA 13 are needed; pip install 'unidiff-sdk"
        f"[{'trt' if device == 'tensorrt' else 'gpu'}]' brings the rest; device='cpu' always works)"
    )


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
