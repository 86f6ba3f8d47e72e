"""The device "auto": the faster engine for CPUs, chosen once, with results that are those of ONNX Runtime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Bundle
from unidiff_sdk.errors import BundleError, OptionError, ProviderError
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.engines import auto
from unidiff_sdk.inference.engines.auto import create_auto_session, processor
from unidiff_sdk.inference.manifest import SwitchableLora, TensorSpec
from unidiff_sdk.inference.sessions import Session

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs the openvino extra")

PROFILE = {
    "sample": {"min": [1, 4, 8, 8], "opt": [32, 4, 8, 8], "max": [32, 4, 8, 8]},
    "timestep": {"min": [1], "opt": [32], "max": [32]},
    "input_ids": {"min": [1, 7], "opt": [1, 7], "max": [1, 7]},
}
INPUTS = {
    "sample": TensorSpec("float32", ("batch", 4, 8, 8)),
    "timestep": TensorSpec("int64", ()),
    "input_ids": TensorSpec("int32", ("batch", "tokens")),
}


class Engines:
    """Two engines whose calls take a given time on a clock of their own.

    Attributes:
        seconds: of a call of each device. `first` is added to the first one.
        noise: what is added to the output of a device, relative to its norm and orthogonal to it.
        loaded: devices and precisions, in order. `calls`: devices.
        feeds: of the last call.
        failing: "load" or "run", and a device.
    """

    def __init__(self, cpu: float, openvino: float, first: float = 0.0) -> None:
        self.seconds, self.first = {"cpu": cpu, "openvino": openvino}, first
        self.noise = {"cpu": 0.0, "openvino": 0.0}
        self.now = 0.0
        self.loaded: list[tuple[str, str | None]] = []
        self.calls: list[str] = []
        self.feeds: dict[str, np.ndarray] = {}
        self.failing: str | None = None

    def create(self, file: Path, **options: Any) -> Session:
        device = options["device"]
        self.loaded.append((device, options["precision"]))
        if self.failing == f"load {device}":
            raise BundleError("unknown operator")
        return FakeSession(self, device)

    def session(self, **options: Any) -> Session:
        given: dict[str, Any] = {
            "device": "auto", "threads": 2, "profile": PROFILE, "half": False, "fingerprint": "f" * 64,
            "capture": False, "precision": None,
        }  # fmt: skip
        engines: dict[str, Any] = {"onnx_engine": self.create, "openvino_engine": self.create, "clock": self.clock}
        return create_auto_session(Path("unet/model.onnx"), **given | options, **engines)

    def clock(self) -> float:
        return self.now


class FakeSession:
    inputs, outputs, captured = INPUTS, {"y": TensorSpec("float32", (2,))}, False

    def __init__(self, engines: Engines, device: str) -> None:
        self.engines, self.device, self.providers = engines, device, (f"{device} provider",)

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        engines = self.engines
        if engines.failing == f"run {self.device}":
            raise BundleError("out of memory")
        engines.feeds = dict(feeds)
        engines.now += engines.seconds[self.device] + (0 if self.device in engines.calls else engines.first)
        engines.calls.append(self.device)
        return {"y": np.array([1, engines.noise[self.device]], np.float32)}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    auto._warn_unwritable.cache_clear()
    return tmp_path / "cache" / "unidiff-sdk" / "auto"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO counts as installed: the engines are fakes."""
    monkeypatch.setattr(auto, "find_spec", lambda name: SimpleNamespace(name=name))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("cpu", "openvino", "provider"),
    [
        (0.1, 0.061, "openvino provider (auto: 0.61 of the time of cpu)"),
        (0.02, 0.1, "cpu provider (auto: 0.20 of the time of openvino)"),
        (0.1, 0.1, "cpu provider (auto: 1.00 of the time of openvino)"),
    ],
)
def test_the_faster_engine_is_chosen(cpu: float, openvino: float, provider: str) -> None:
    engines = Engines(cpu, openvino, first=0.7)  # what a first call takes longer does not count
    session = engines.session()
    assert session.providers == (provider,)
    assert engines.calls == ["openvino", "cpu"] * auto.ROUNDS  # in turns
    assert (session.inputs, session.outputs, session.captured) == (FakeSession.inputs, FakeSession.outputs, False)
    session.run({})
    assert engines.calls[-1] == provider.split()[0]


@pytest.mark.usefixtures("installed")
def test_the_usual_shapes_are_measured_with_few_images() -> None:
    engines = Engines(0.1, 0.1)
    engines.session()
    described = {name: (array.dtype.name, array.shape) for name, array in engines.feeds.items()}
    assert described == {"sample": ("float32", (4, 4, 8, 8)), "timestep": ("int64", ()), "input_ids": ("int32", (1, 7))}
    assert engines.feeds["timestep"] == 500 and 0 < engines.feeds["input_ids"].min() <= 255
    assert 0.9 < engines.feeds["sample"].std() < 1.1


@pytest.mark.usefixtures("installed")
def test_slow_graphs_are_called_once_each() -> None:
    engines = Engines(8, 5)
    assert "0.62 of the time of cpu" in engines.session().providers[0]
    assert engines.calls == ["openvino", "cpu"]


@pytest.mark.usefixtures("installed")
def test_a_choice_is_made_once(cache: Path) -> None:
    first = Engines(0.1, 0.05).session()
    again = Engines(0.1, 9.0)
    assert again.session().providers == first.providers
    assert again.loaded == [("openvino", "f32")] and not again.calls
    (file,) = cache.iterdir()
    assert file.name.startswith("ffffffffffffffff-unet-")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("changed", ["fingerprint", "threads", "precision", "processor", "versions"])
def test_what_a_choice_depends_on(changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Engines(0.1, 0.05).session()
    options = {"fingerprint": "e" * 64, "threads": 1, "precision": "bf16"}
    if changed == "processor":
        monkeypatch.setattr(auto, "processor", lambda: "another")
    if changed == "versions":
        monkeypatch.setattr(auto, "_version", lambda name: f"{name} 99")
    engines = Engines(0.1, 0.2)
    engines.session(**{name: value for name, value in options.items() if name == changed})
    assert len(engines.calls) == 2 * auto.ROUNDS


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    "damage",
    [
        lambda record: b"",
        lambda record: b"\xff{",
        lambda record: b"[1]",
        lambda record: json.dumps(record | {"ratio": "0.5"}).encode(),
        lambda record: json.dumps(record | {"ratio": -1}).encode(),
        lambda record: json.dumps(record | {"ratio": float("nan")}).encode(),
        lambda record: json.dumps(record | {"cosine": None}).encode(),
        lambda record: json.dumps(record | {"key": {}}).encode(),
        lambda record: b" " * (auto.MAX_RECORD + 1),
    ],
)
def test_a_damaged_record_is_measured_and_written_again(damage: Any, cache: Path) -> None:
    Engines(0.1, 0.05).session()
    (file,) = cache.iterdir()
    file.write_bytes(damage(json.loads(file.read_bytes())))
    engines = Engines(0.1, 0.2)
    assert engines.session().providers == ("cpu provider (auto: 0.50 of the time of openvino)",)
    assert len(engines.calls) == 2 * auto.ROUNDS
    again = Engines(0.1, 0.2)
    assert again.session().providers and not again.calls


@pytest.mark.usefixtures("installed")
def test_without_a_writable_cache_it_measures_and_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"file.*auto cannot be written.*set XDG_CACHE_HOME") as warnings:
        for _ in range(2):
            engines = Engines(0.1, 0.05)
            assert engines.session().providers[0].startswith("openvino")
            assert engines.calls
    assert len(warnings) == 1


@pytest.mark.usefixtures("installed")
def test_a_graph_without_a_fingerprint_is_measured_each_time(cache: Path) -> None:
    for _ in range(2):
        engines = Engines(0.1, 0.05)
        engines.session(fingerprint="")
        assert engines.calls
    assert not cache.exists()


def test_without_openvino_it_is_the_cpu(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    for options in ({}, {"precision": "f32"}):
        engines = Engines(0.1, 0.05)
        assert engines.session(**options).providers == ("cpu provider",)
        assert engines.loaded == [("cpu", None)] and not engines.calls
    bundle = Bundle.open("tiny", threads=1, device="auto")
    assert bundle.session("text_encoder").providers == ("CPUExecutionProvider",)
    assert not cache.exists()


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("failing", ["load openvino", "run openvino"])
def test_what_openvino_cannot_run_runs_on_the_cpu(failing: str, cache: Path) -> None:
    engines = Engines(0.1, 0.05)
    engines.failing = failing
    assert engines.session().providers == ("cpu provider (auto: openvino cannot run this graph)",)
    assert not cache.exists()  # memory may suffice the next time
    with pytest.raises(BundleError, match=r"unknown operator|out of memory"):
        engines.session(precision="bf16")


@pytest.mark.usefixtures("installed")
def test_an_engine_that_diverges_is_not_chosen() -> None:
    engines = Engines(0.1, 0.05)
    engines.noise["openvino"] = 0.1
    assert engines.session().providers == ("cpu provider (auto: openvino diverges, cosine 0.9950)",)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_half_precision_is_compared_with_float32(precision: str) -> None:
    engines = Engines(0.1, 0.3)  # the precision was asked for, whatever its speed
    engines.noise["openvino"] = 0.01
    for _ in range(2):
        (provider,) = engines.session(precision=precision).providers
        assert provider == "openvino provider (auto: 3.00 of the time of cpu, cosine 0.99995)"
    assert engines.loaded == [("openvino", precision), ("cpu", None), ("openvino", precision)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("noise", [0.1, np.nan])
def test_too_coarse_half_precision_is_refused(noise: float) -> None:
    engines = Engines(0.1, 0.05)
    engines.noise["openvino"] = noise
    for _ in range(2):
        with pytest.raises(
            BundleError, match=r"unet.*diverges from f32 in bf16: cosine 0\.(99|00).., required ≥ 0.999"
        ):
            engines.session(precision="bf16")
    assert len(engines.loaded) == 2  # the second time, the record is enough
    with pytest.raises(BundleError, match="usual sizes of its inputs are unknown"):
        engines.session(precision="f16", profile=None)


def test_processors_are_told_apart(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    core = "processor\t: {}\nmodel name\t: Xeon\ncpu MHz\t\t: {}\nflags\t\t: avx2 {}\n\n"
    found = []
    for number, frequency, flags in ((0, 2100, "amx_bf16"), (0, 3000, "amx_bf16"), (0, 2100, "avx512f")):
        cpuinfo.write_text(core.format(number, frequency, flags) + core.format(1, 800, flags))
        found.append(processor(cpuinfo))
    assert found[0] == found[1] != found[2]
    assert found[0] == "model name\t: Xeon\nflags\t\t: avx2 amx_bf16"
    assert processor(tmp_path / "missing")


# Bundles


def test_bundles_that_openvino_cannot_run_stay_on_the_cpu(tmp_path: Path) -> None:
    bundle = Bundle.open(make_toy_bundle(tmp_path / "toy"))
    lora = SwitchableLora(1.0, {})
    for changed in ({"target": "cuda", "devices": ("cuda", "cpu")}, {"loras": {"shoes": lora}}):
        opened = Bundle(bundle.path, replace(bundle.manifest, **changed), device="auto", precision="f32")
        assert opened.device == "cpu"
        assert opened.session("text_encoder").providers == ("CPUExecutionProvider",)
    only_cuda = replace(bundle.manifest, target="cuda", devices=("cuda",))
    with pytest.raises(BundleError, match="was exported for cuda"):
        Bundle(bundle.path, only_cuda, device="auto")
    with pytest.raises(BundleError, match="OpenVINO runs bundles for CPUs"):
        Bundle(bundle.path, replace(only_cuda, devices=("cuda", "cpu")), device="auto", precision="bf16")


def test_options_are_checked(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    for device in ("auto:CPU", "Auto"):
        with pytest.raises(OptionError, match=r"device is .*use one of cpu, cuda, tensorrt, openvino, auto"):
            Bundle.open(folder, device=device)
    with pytest.raises(OptionError, match="is an fp32 bundle; export another with --int8"):
        Bundle.open(folder, device="auto", precision="int8")
    with pytest.raises(OptionError, match="capture=True needs device='cuda'"):
        Bundle.open(folder, device="auto", capture=True).session("unet")
    with pytest.raises((OptionError, ProviderError), match=r"precision is 'fp8'|OpenVINO is not installed"):
        Bundle.open(folder, device="auto", precision="fp8").session("unet")


@needs_openvino
def test_the_installed_engines_are_compared(cache: Path) -> None:
    reference, bundle = Bundle.open("tiny", threads=1), Bundle.open("tiny", threads=1, device="auto")
    assert bundle.device == "auto"
    found = {warmup.graph: warmup.providers for warmup in bundle.warmup()}
    for (provider, *_), graph in zip(found.values(), found, strict=True):
        engine, ratio = provider.split(" (auto: ")
        assert engine in ("CPUExecutionProvider", "openvino:CPU, f32"), graph
        assert 0 < float(ratio.split()[0]) <= 1
        record = next(json.loads(file.read_bytes()) for file in cache.glob(f"*-{graph}-*"))
        assert record["cosine"] > 0.999999
        assert (record["ratio"] < 1) == engine.startswith("openvino")
    texts = ["purple dotted boots", "red shoes"]
    ours, theirs = (Encoder(each).encode_texts(texts) for each in (bundle, reference))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    opened = Bundle.open("tiny", threads=1, device="auto")
    assert {graph: opened.session(graph).providers for graph in found} == found


OPENED = """
from unidiff_sdk import Bundle
print(Bundle.open("tiny", device="auto", threads=1, verify=False).session("text_encoder").providers)
"""


@needs_openvino
def test_two_processes_may_choose_at_the_same_time(cache: Path) -> None:
    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-W", "error", "-c", OPENED], stdout=subprocess.PIPE, text=True)

    processes = [start() for _ in range(3)]
    answers = [process.communicate(timeout=240)[0] for process in processes]
    assert all("(auto: " in answer for answer in answers) and not any(process.returncode for process in processes)
    (file,) = cache.iterdir()  # nor is an unfinished one left
    last = start().communicate(timeout=240)[0]
    assert last in answers
    assert json.loads(file.read_bytes())["key"]["threads"] == 1 and os.access(file, os.R_OK)
