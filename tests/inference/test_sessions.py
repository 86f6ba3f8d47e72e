from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk.errors import OptionError, ProviderError
from unidiff_sdk.inference import sessions
from unidiff_sdk.inference.sessions import create_session, saturates


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy") / "unet" / "model.onnx"


def site_packages(folder: Path, *distributions: str, code: str = "") -> Path:
    """A folder as pip leaves it: the module, and a record for each distribution."""
    (folder / "onnxruntime").mkdir()
    (folder / "onnxruntime" / "__init__.py").write_text(code)
    for distribution in distributions:
        (folder / f"{distribution}-1.23.0.dist-info").mkdir()
    return folder


def run_with(folder: Path) -> str:
    """What create_session says in a fresh process that finds ONNX Runtime in `folder`."""
    code = (
        "import sys; from pathlib import Path; from unidiff_sdk.inference.sessions import create_session, saturates\n"
        "from unidiff_sdk.errors import ProviderError\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        "try: create_session(Path('x.onnx'))\n"
        "except ProviderError as error: print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def test_a_session_runs_on_the_device_asked_for(graph: Path) -> None:
    session = create_session(graph, threads=1)
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert [value.name for value in session.get_inputs()] == ["sample", "timestep", "encoder_hidden_states"]


@pytest.mark.parametrize("vnni", [False, True])
def test_integer_products_do_not_saturate_where_there_is_no_vnni(
    graph: Path, vnni: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "saturates", lambda: not vnni)
    options = create_session(graph, threads=1).get_session_options()
    if vnni:
        with pytest.raises(RuntimeError, match="x64quantprecision"):  # nothing was said of it
            options.get_session_config_entry("session.x64quantprecision")
    else:
        assert options.get_session_config_entry("session.x64quantprecision") == "1"


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
def test_processors_that_saturate(cpuinfo: str | None, expected: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert saturates(file) == expected


def test_both_packages_are_found_before_either_is_imported(tmp_path: Path) -> None:
    said = run_with(site_packages(tmp_path, "onnxruntime", "onnxruntime_gpu", code="raise SystemError"))
    assert said == (
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files; keep one of them: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'unidiff-sdk[cpu]'   (or [gpu])"
    )


def test_a_damaged_package_names_itself(tmp_path: Path) -> None:
    said = run_with(site_packages(tmp_path, "onnxruntime_gpu", code="raise ImportError('no libcudart')"))
    assert said == "onnxruntime-gpu cannot be imported (no libcudart): pip install --force-reinstall onnxruntime-gpu"


def test_the_rest_of_a_removed_package_is_not_taken_for_one(tmp_path: Path) -> None:
    assert "onnxruntime is incomplete: pip install --force-reinstall" in run_with(site_packages(tmp_path))


def test_no_package_at_all(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ProviderError, match=r"ONNX Runtime is not installed: pip install 'unidiff-sdk\[cpu\]'"):
        create_session(graph)


@pytest.mark.parametrize(("device", "extra"), [("cuda", "gpu"), ("tensorrt", "trt")])
def test_a_device_that_this_build_lacks_comes_with_the_line_that_mends_it(graph: Path, device: str, extra: str) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("a build of ONNX Runtime for GPUs")
    with pytest.raises(ProviderError, match=f"device '{device}' cannot be used .* built for .* only") as raised:
        create_session(graph, device=device)
    assert f"pip uninstall -y onnxruntime && pip install 'unidiff-sdk[{extra}]'" in str(raised.value)


class FakeOnnxRuntime:
    """ONNX Runtime as built for GPUs, up to the session: it notes what the providers are told, and loads `loads`.

    With `error`, it raises that instead; with `refused` too, only where CUDA is told that option.
    """

    __version__ = "9.9.9"

    def __init__(self, loads: list[str], error: str = "", refused: str = "") -> None:
        import onnxruntime

        self.SessionOptions = onnxruntime.SessionOptions
        self.loads, self.error, self.refused = loads, error, refused
        self.told: dict[str, dict[str, str]] = {}

    def get_available_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self) -> None:
        pass

    def InferenceSession(
        self, file: str, options: Any, providers: list[tuple[str, dict[str, str]]], enable_fallback: int
    ) -> Any:
        assert not enable_fallback
        self.told = dict(providers)
        if self.error and (not self.refused or self.refused in self.told["CUDAExecutionProvider"]):
            raise RuntimeError(self.error)
        return SimpleNamespace(get_providers=lambda: self.loads)


def fake(monkeypatch: pytest.MonkeyPatch, *loads: str, error: str = "", refused: str = "") -> FakeOnnxRuntime:
    module = FakeOnnxRuntime(list(loads), error, refused)
    monkeypatch.setattr(sessions, "_import_onnxruntime", lambda: module)
    return module


PROFILE = {
    "sample": {"min": [1, 4, 4, 4], "opt": [2, 4, 8, 8], "max": [8, 4, 12, 12]},
    "timestep": {"min": [1], "opt": [2], "max": [8]},
}


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_listed_but_does_not_load(
    graph: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(monkeypatch, "CPUExecutionProvider")
    monkeypatch.setattr(sessions, "_load_tensorrt", lambda: "101304")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ProviderError, match=f"device '{device}' cannot be used .* did not load"):
        create_session(graph, device=device)


def test_what_a_provider_says_of_its_failure_is_told(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, error="CUDA failure 100: no CUDA-capable device is detected")
    with pytest.raises(ProviderError, match=r"device 'cuda' cannot be used .*no CUDA-capable device"):
        create_session(graph, device="cuda")


def test_tensorrt_without_its_library(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "TensorrtExecutionProvider")
    monkeypatch.setattr(sessions, "_TENSORRT_LIBRARY", "libnvinfer.so.missing")
    with pytest.raises(ProviderError, match=r"unidiff-sdk\[trt\]' .*: libnvinfer.so.missing was not found"):
        create_session(graph, device="tensorrt")


@pytest.mark.parametrize("half", [False, True])
def test_what_tensorrt_is_told(graph: Path, half: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake(monkeypatch, "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
    monkeypatch.setattr(sessions, "_load_tensorrt", lambda: "101304")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    create_session(graph, device="tensorrt", profile=PROFILE, half=half, fingerprint="0123456789abcdef" * 4)
    timings = tmp_path / "unidiff-sdk" / "tensorrt" / "onnxruntime-9.9.9-tensorrt-101304"
    engines = timings / "0123456789abcdef-unet"
    assert module.told == {
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


def test_an_engine_folder_that_cannot_be_made(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, "TensorrtExecutionProvider")
    monkeypatch.setattr(sessions, "_load_tensorrt", lambda: "101304")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ProviderError, match=r"engines cannot be kept in .*file.*; set XDG_CACHE_HOME"):
        create_session(graph, device="tensorrt", profile=PROFILE)


def test_graph_capture_is_asked_for_or_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake(monkeypatch, "CUDAExecutionProvider", "CPUExecutionProvider")
    create_session(graph, device="cuda", profile=PROFILE)
    assert module.told == {"CUDAExecutionProvider": {}, "CPUExecutionProvider": {}}
    create_session(graph, device="cuda", profile=PROFILE, capture=True)
    assert module.told["CUDAExecutionProvider"] == {"enable_cuda_graph": "1"}
    for options in ({"device": "cpu", "profile": PROFILE}, {"device": "cuda"}):
        with pytest.raises(OptionError, match="capture=True is for device='cuda'"):
            create_session(graph, capture=True, **options)


def test_a_graph_that_cannot_be_captured_is_called_as_without(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = "This session cannot use the graph capture feature as requested by the user"
    module = fake(monkeypatch, "CUDAExecutionProvider", error=error, refused="enable_cuda_graph")
    session = create_session(graph, device="cuda", profile=PROFILE, capture=True)
    assert not session.captured
    assert module.told == {"CUDAExecutionProvider": {}, "CPUExecutionProvider": {}}


def test_options_are_checked(graph: Path) -> None:
    with pytest.raises(OptionError, match="device 'tpu' is not known; use one of cpu, cuda, tensorrt"):
        create_session(graph, device="tpu")
    with pytest.raises(OptionError, match="threads is 0"):
        create_session(graph, threads=0)
