"""ONNX Runtime: its packages, its providers, and buffers on a device, with sessions on the CPU.

Whether a CUDA graph is really captured, or an engine really built, shows only where there is a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk.errors import ProviderError
from unidiff_sdk.inference.engines.onnx_runtime import (
    OnnxSession,
    create_onnx_session,
    saturates,
    session_options,
    tensorrt_version,
)
from unidiff_sdk.inference.sessions import create_session

onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy") / "unet" / "model.onnx"


# Packages


def site_packages(folder: Path, *distributions: str, code: str = "") -> Path:
    """A folder as pip leaves it: the module, and a record for each distribution."""
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "__init__.py").write_text(code)
    for distribution in distributions:
        (folder / f"{distribution}-1.23.0.dist-info").mkdir()
    return folder


def error_with(prepare: str) -> str:
    """The error of create_session in a fresh process, after the statement `prepare`."""
    code = (
        "import sys; from pathlib import Path; from unidiff_sdk.inference.sessions import create_session\n"
        "from unidiff_sdk.errors import ProviderError\n"
        f"{prepare}\n"
        "try: create_session(Path('x.onnx'))\n"
        "except ProviderError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def error_in(folder: Path) -> str:
    """The same in a process that finds ONNX Runtime in `folder`."""
    return error_with(f"sys.path.insert(0, {str(folder)!r})")


def test_two_packages_are_reported_before_either_is_imported(tmp_path: Path) -> None:
    assert error_in(site_packages(tmp_path, "onnxruntime", "onnxruntime_gpu", code="raise SystemError")) == (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one of them: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'unidiff-sdk[cpu]'   (or [gpu])"
    )


def test_damaged_package_is_named(tmp_path: Path) -> None:
    error = error_in(site_packages(tmp_path, "onnxruntime_gpu", code="raise ImportError('no libcudart')"))
    assert error == "onnxruntime-gpu cannot be imported (no libcudart): pip install --force-reinstall onnxruntime-gpu"


def test_remains_of_a_removed_package_are_reported(tmp_path: Path) -> None:
    assert "onnxruntime is incomplete: pip install --force-reinstall" in error_in(site_packages(tmp_path))


def test_missing_package_is_reported() -> None:
    error = error_with("sys.modules['onnxruntime'] = None")
    assert error.startswith("ONNX Runtime is not installed: pip install 'unidiff-sdk[cpu]'")


# Processors


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor: 0\nflags\t\t: fpu sse2 avx2 avx512f\n", True),
        ("flags : fpu avx512f avx512_vnni\n", False),
        ("flags : fpu avx2 avx_vnni\n", False),
        ("Features : fp asimd asimddp\n", False),  # an ARM processor
        (None, False),  # no such file
    ],
)
def test_integer_products_do_not_saturate_where_there_is_no_vnni(
    cpuinfo: str | None, expected: bool, tmp_path: Path
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert saturates(file) == expected
    options = session_options(onnxruntime, threads=1, cpuinfo=file)
    if expected:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"
    else:
        with pytest.raises(RuntimeError, match="x64quantprecision"):  # not set
            options.get_session_config_entry("session.x64quantprecision")


def test_threads_of_a_session_wait_without_the_processor() -> None:
    options = session_options(onnxruntime, threads=2)
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert int(options.get_session_config_entry("session.intra_op.spin_duration_us")) == 1000


# Providers


class FakeOnnxRuntime:
    """ONNX Runtime as built for GPUs. Records the options of the providers, and reports `loads` as loaded.

    With `error`, loading fails with that text; with `refused` too, only where CUDA has that option.
    """

    __version__ = "9.9.9"
    SessionOptions = onnxruntime.SessionOptions

    def __init__(self, *loads: str, error: str = "", refused: str = "") -> None:
        self.loads, self.error, self.refused = list(loads), error, refused
        self.options: dict[str, dict[str, str]] = {}

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        pass

    def InferenceSession(
        self, file: str, options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> Any:
        assert not enable_fallback
        self.options = dict(providers)
        if self.error and (not self.refused or self.refused in self.options["CUDAExecutionProvider"]):
            raise RuntimeError(self.error)
        nothing: list[Any] = []
        return SimpleNamespace(
            get_providers=lambda: self.loads, get_inputs=lambda: nothing, get_outputs=lambda: nothing
        )


PROFILE = {
    "sample": {"min": [1, 4, 4, 4], "opt": [2, 4, 8, 8], "max": [8, 4, 12, 12]},
    "timestep": {"min": [1], "opt": [2], "max": [8]},
}


def create(file: Path, runtime: FakeOnnxRuntime, **options: Any) -> OnnxSession:
    defaults = {"threads": None, "profile": None, "half": False, "fingerprint": "", "capture": False, "precision": None}
    return create_onnx_session(file, **defaults | options, onnxruntime=runtime, find_tensorrt=lambda: "101304")


@pytest.mark.parametrize(("device", "extra"), [("cuda", "gpu"), ("tensorrt", "trt")])
def test_device_that_the_package_lacks_is_reported_with_a_fix(graph: Path, device: str, extra: str) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("a build of ONNX Runtime for GPUs")
    with pytest.raises(ProviderError, match=f"device '{device}' is not available .* built for .* only") as raised:
        create_session(graph, device=device)
    assert f"pip uninstall -y onnxruntime && pip install 'unidiff-sdk[{extra}]'" in str(raised.value)


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_device_that_is_listed_but_does_not_load_is_reported(
    graph: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ProviderError, match=f"device '{device}' is not available .* did not load"):
        create(graph, FakeOnnxRuntime("CPUExecutionProvider"), device=device)


def test_error_of_a_provider_is_passed_on(graph: Path) -> None:
    runtime = FakeOnnxRuntime(error="CUDA failure 100: no CUDA-capable device is detected")
    with pytest.raises(ProviderError, match=r"device 'cuda' is not available .*no CUDA-capable device"):
        create(graph, runtime, device="cuda")


def test_missing_tensorrt_library_is_reported() -> None:
    with pytest.raises(ProviderError, match=r"unidiff-sdk\[trt\]'; .*: libnvinfer.so.missing was not found"):
        tensorrt_version("libnvinfer.so.missing")


@pytest.mark.parametrize("half", [False, True])
def test_tensorrt_receives_profile_precision_and_cache(
    graph: Path, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runtime = FakeOnnxRuntime("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    create(graph, runtime, device="tensorrt", profile=PROFILE, half=half, fingerprint="0123456789abcdef" * 4)
    timings = tmp_path / "unidiff-sdk" / "tensorrt" / "onnxruntime-9.9.9-tensorrt-101304"
    engines = timings / "0123456789abcdef-unet"
    assert runtime.options == {
        "TensorrtExecutionProvider": {
            "trt_fp16_enable": str(int(half)),
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(timings),
            "trt_profile_min_shapes": "sample:1x4x4x4,timestep:1",
            "trt_profile_opt_shapes": "sample:2x4x8x8,timestep:2",
            "trt_profile_max_shapes": "sample:8x4x12x12,timestep:8",
        },
        "CUDAExecutionProvider": {},
        "CPUExecutionProvider": {},
    }
    assert engines.is_dir()


def test_engine_folder_that_cannot_be_created_is_reported(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ProviderError, match=r"engines cannot be stored in .*file.*; set XDG_CACHE_HOME"):
        create(graph, FakeOnnxRuntime("TensorrtExecutionProvider"), device="tensorrt", profile=PROFILE)


def test_graph_capture_is_enabled_on_request(graph: Path) -> None:
    runtime = FakeOnnxRuntime("CUDAExecutionProvider", "CPUExecutionProvider")
    assert not create(graph, runtime, device="cuda", profile=PROFILE).captured
    assert runtime.options == {"CUDAExecutionProvider": {}, "CPUExecutionProvider": {}}
    assert create(graph, runtime, device="cuda", profile=PROFILE, capture=True).captured
    assert runtime.options["CUDAExecutionProvider"] == {"enable_cuda_graph": "1"}


def test_graph_that_cannot_be_captured_loads_without(graph: Path) -> None:
    error = "This session cannot use the graph capture feature as requested by the user"
    runtime = FakeOnnxRuntime("CUDAExecutionProvider", error=error, refused="enable_cuda_graph")
    assert not create(graph, runtime, device="cuda", profile=PROFILE, capture=True).captured
    assert runtime.options == {"CUDAExecutionProvider": {}, "CPUExecutionProvider": {}}


# Buffers


class CountedSession(onnxruntime.InferenceSession):  # type: ignore[misc]
    """Counts ordinary and buffered calls."""

    ordinary = buffered = 0

    def run(self, *arguments: Any) -> Any:
        self.ordinary += 1
        return super().run(*arguments)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self.buffered += 1
        super().run_with_iobinding(*arguments)


def unet_feeds(batch: int, side: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 4, side, side), dtype=np.float32),
        "timestep": np.linspace(10, 900, batch, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 12, 8), dtype=np.float32),
    }


def shapes_of(feeds: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds.items()}


@pytest.mark.parametrize("capture", [False, True])
def test_buffered_calls_return_what_ordinary_calls_return(graph: Path, capture: bool) -> None:
    counted = CountedSession(str(graph), session_options(onnxruntime, 1), providers=["CPUExecutionProvider"])
    buffered = OnnxSession(counted, onnxruntime, buffered=shapes_of(unet_feeds(2)), capture=capture)
    first = buffered.run(unet_feeds(2, seed=1), ["out_sample"])["out_sample"]
    kept = first.copy()
    second = buffered.run(unet_feeds(2, seed=2))["out_sample"]
    assert (counted.ordinary, counted.buffered) == (1, 2)  # the ordinary one tells the shapes of the outputs
    other = buffered.run(unet_feeds(3, side=4))["out_sample"]
    assert (counted.ordinary, counted.buffered) == (2, 2)
    plain = create_session(graph, threads=1)
    for ours, feeds in ((first, unet_feeds(2, seed=1)), (second, unet_feeds(2, seed=2)), (other, unet_feeds(3, 4))):
        np.testing.assert_array_equal(ours, plain.run(feeds)["out_sample"])
    np.testing.assert_array_equal(first, kept)  # a result does not lie in the buffers
    assert buffered.providers == ("CPUExecutionProvider",)


def test_buffered_calls_accept_arrays_that_are_not_contiguous(graph: Path) -> None:
    plain = onnxruntime.InferenceSession(str(graph), session_options(onnxruntime, 1))
    feeds = unet_feeds(2)
    feeds["sample"] = feeds["sample"].transpose(0, 1, 3, 2)
    buffered = OnnxSession(plain, onnxruntime, buffered=shapes_of(feeds))
    np.testing.assert_array_equal(buffered.run(feeds)["out_sample"], plain.run(None, feeds)[0])
