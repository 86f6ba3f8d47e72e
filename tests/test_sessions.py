from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from toy_bundle import make_toy_bundle

from unidiff_sdk import sessions
from unidiff_sdk.errors import OptionError, ProviderError
from unidiff_sdk.sessions import create_session


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
        "import sys; from pathlib import Path; from unidiff_sdk.sessions import create_session\n"
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


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_this_build_lacks(graph: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(sessions, "_import_onnxruntime", lambda: fake)
    with pytest.raises(ProviderError, match=f"device '{device}' cannot be used .* built for CPUExecutionProvider only"):
        create_session(graph, device=device)


def test_a_device_that_is_listed_but_does_not_load(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    def falls_back(file: str, options: Any, providers: list[str]) -> Any:
        assert providers == ["CUDAExecutionProvider", "CPUExecutionProvider"]
        return SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])

    fake = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        preload_dlls=lambda: None,
        SessionOptions=onnxruntime.SessionOptions,
        InferenceSession=falls_back,
    )
    monkeypatch.setattr(sessions, "_import_onnxruntime", lambda: fake)
    with pytest.raises(ProviderError, match=r"device 'cuda' cannot be used .* did not load"):
        create_session(graph, device="cuda")


def test_options_are_checked(graph: Path) -> None:
    with pytest.raises(OptionError, match="device 'tpu' is not known; use one of cpu, cuda, tensorrt"):
        create_session(graph, device="tpu")
    with pytest.raises(OptionError, match="threads is 0"):
        create_session(graph, threads=0)
