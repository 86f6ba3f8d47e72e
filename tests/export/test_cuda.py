"""Results on an NVIDIA GPU agree with those on the CPU. Skipped on machines without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unidiff_sdk.errors import ProviderError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.sessions import create_session

PROMPT = "a red striped dress"


def has_cuda() -> bool:
    try:
        create_session(TINY / "image_encoder" / "model.onnx", device="cuda")
    except ProviderError:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_cuda(), reason="needs an NVIDIA GPU and the gpu extra")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The built-in model, exported for a GPU."""
    exporter = pytest.importorskip("unidiff_export.exporter", reason="needs the export extra")
    folder = tmp_path_factory.mktemp("cuda")
    for precision in ("fp32", "fp16"):
        exporter.export_bundle("tiny", folder / precision, precision=precision, target="cuda")
    return {precision: folder / precision for precision in ("fp32", "fp16")}


def random_inputs(bundle: Bundle, graph: str, bound: str) -> dict[str, np.ndarray]:
    profile = bundle.profile(graph)
    assert profile is not None
    rng = np.random.default_rng(0)
    inputs = {}
    for name, bounds in profile.items():
        if name == "input_ids":
            inputs[name] = rng.integers(0, 500, bounds[bound])
        elif name == "timestep":
            inputs[name] = rng.uniform(0, 999, bounds[bound]).astype(np.float32)
        else:
            inputs[name] = rng.standard_normal(bounds[bound], dtype=np.float32)
    return inputs


def relative_error(ours: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(ours - expected).max() / np.abs(expected).max())


def psnr(a: object, b: object) -> float:
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-12)))


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("graph", ["text_encoder", "image_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_graphs_agree_with_the_cpu(graph: str, capture: bool) -> None:
    on_cpu, on_gpu = Bundle.open("tiny"), Bundle.open("tiny", device="cuda", capture=capture)
    session = on_gpu.session(graph)
    assert session.providers[0] == "CUDAExecutionProvider"
    for bound in ("opt", "max", "opt", "min"):  # typical shapes are bound or replayed, others are not
        inputs = random_inputs(on_cpu, graph, bound)
        ours, expected = session.run(inputs), on_cpu.session(graph).run(inputs)
        for name in expected:
            assert relative_error(ours[name], expected[name]) < 5e-3  # a GPU computes convolutions in TF32


def test_images_agree_with_the_cpu() -> None:
    expected = Generator(Bundle.open("tiny")).generate(PROMPT, n=2, steps=8)
    for capture in (False, True):
        images = Generator(Bundle.open("tiny", device="cuda", capture=capture)).generate(PROMPT, n=2, steps=8)
        assert min(psnr(a, b) for a, b in zip(images, expected, strict=True)) > 35


def test_image_does_not_depend_on_its_batch() -> None:
    generator = Generator(Bundle.open("tiny", device="cuda"))
    together, alone = generator.generate(PROMPT, n=4, steps=8), generator.generate(PROMPT, seed=3, steps=8)[0]
    assert np.abs(np.asarray(together[3], int) - np.asarray(alone, int)).max() <= 3


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bundle_for_cuda_generates_the_same_images(exported: dict[str, Path], precision: str, capture: bool) -> None:
    bundle = Bundle.open(exported[precision], device="cuda", capture=capture)
    assert bundle.manifest.parity["cuda"]["image"]["psnr_db"] > 35
    expected = Generator(Bundle.open("tiny")).generate(PROMPT, n=2, steps=8)
    images = Generator(bundle).generate(PROMPT, n=2, steps=8)
    assert min(psnr(a, b) for a, b in zip(images, expected, strict=True)) > 30


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("graph", ["unet", "vae_decoder", "vae_encoder"])
def test_graphs_for_cuda_agree_with_the_cpu(exported: dict[str, Path], precision: str, graph: str) -> None:
    on_cpu, on_gpu = Bundle.open("tiny"), Bundle.open(exported[precision], device="cuda")
    for bound in ("opt", "max", "min"):
        inputs = random_inputs(on_cpu, graph, bound)
        (ours,), (expected,) = (bundle.session(graph).run(inputs).values() for bundle in (on_gpu, on_cpu))
        assert relative_error(ours, expected) < 2e-2


def test_warmup_reports_providers(exported: dict[str, Path]) -> None:
    report = Bundle.open(exported["fp16"], device="cuda", capture=True).warmup()
    assert {row.providers[0] for row in report} == {"CUDAExecutionProvider"}
    assert {row.graph for row in report if row.captured} == {"unet", "vae_decoder", "vae_encoder", "image_encoder"}
    assert all(row.next_seconds <= row.first_seconds for row in report)


def test_hidden_gpu_is_an_error() -> None:
    code = "from unidiff_sdk import Bundle; Bundle.open('tiny', device='cuda').session('unet')"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=hidden, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ProviderError: device 'cuda' is not available" in done.stderr
