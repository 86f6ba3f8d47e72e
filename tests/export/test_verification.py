"""Verification accepts results that agree with PyTorch and refuses others with the figure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from PIL import Image
from support.references import UNIT, gray_reference

from unidiff_export import exporter
from unidiff_export.bundle.exported import Exported
from unidiff_export.graphs.lowering import GraphSpec
from unidiff_export.reference import LARGE, workload_for
from unidiff_export.verification import (
    TOLERANCES,
    EmbeddingParity,
    Evidence,
    GraphParity,
    ImageParity,
    SearchParity,
    ToleranceError,
    compare_embeddings,
    compare_graph,
    compare_images,
    compare_search,
    expected_outputs,
    psnr_db,
    random_calls,
)
from unidiff_sdk.errors import ExportError, GenerationError
from unidiff_sdk.inference.manifest import TensorSpec

SPEC = GraphSpec("half", torch.nn.Tanh(), 0, {"x": {}}, ("y",), lambda batch, scale: (torch.ones(batch, scale),))


class FunctionSession:
    """A session whose output y is a function of its input x."""

    inputs: ClassVar[dict[str, TensorSpec]] = {"x": TensorSpec("float32", ("batch", 1))}
    outputs: ClassVar[dict[str, TensorSpec]] = {"y": TensorSpec("float32", ("batch", 1))}
    providers, captured = ("NumPy",), False

    def __init__(self, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.function = function

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return {"y": self.function(feeds["x"])}


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_graph_that_agrees_has_a_small_error_and_a_cosine_of_one() -> None:
    parity = compare_graph(FunctionSession(np.tanh), SPEC, TOLERANCES["fp32"], expected_outputs(SPEC))
    assert parity.max_abs_error < 1e-6
    assert parity.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda x: np.tanh(x) + 0.01,
            r"half diverges from PyTorch: largest error 0.01, allowed ≤ 1e-04\. Install the package versions",
        ),
        (lambda x: x * np.float32(np.nan), "half: y is not finite, but PyTorch's is, because a value overflowed"),
        (lambda x: x[:1, :1], r"half: y has shape \(1, 1\), but PyTorch's has shape \(3, 1\)"),
    ],
)
def test_graph_that_diverges_is_refused(function: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        compare_graph(FunctionSession(function), SPEC, TOLERANCES["fp32"], expected_outputs(SPEC))


def test_graph_with_another_direction_is_refused() -> None:
    with pytest.raises(ToleranceError, match=r"cosine -1\.0000, required ≥ 0\.98\. 8 bits are too coarse") as error:
        compare_graph(FunctionSession(lambda x: -np.tanh(x)), SPEC, TOLERANCES["int8"], expected_outputs(SPEC))
    assert error.value.graphs == ("half",)


def test_checkpoint_with_nan_weights_is_reported_as_broken() -> None:
    spec = dataclasses.replace(SPEC, example=lambda batch, scale: (torch.full((batch, scale), torch.nan),))
    with pytest.raises(ExportError, match="not finite in PyTorch either, so the checkpoint is broken"):
        compare_graph(FunctionSession(np.tanh), spec, TOLERANCES["fp32"], expected_outputs(spec))


@pytest.mark.parametrize(("policy", "device"), [(None, "meta"), (object(), "cpu")])
def test_weights_are_released_before_a_graph_is_loaded(policy: Any, device: str) -> None:
    layer = torch.nn.Linear(2, 2)
    weight, bias = (parameter.detach().numpy().copy() for parameter in layer.parameters())
    spec = dataclasses.replace(SPEC, module=layer, example=lambda batch, scale: (torch.randn(batch * scale, 2),))
    exported: Any = Exported([spec], {}, None, None, policy, None, None, modules=[layer])  # type: ignore[arg-type]
    devices: list[str] = []

    def session(graph: str) -> FunctionSession:
        devices.append(layer.weight.device.type)
        return FunctionSession(lambda x: x @ weight.T + bias)

    bundle: Any = SimpleNamespace(
        exported=exported,
        writer=SimpleNamespace(graphs={"half": SimpleNamespace(precision="fp32")}),
        precision="fp32",
        open=lambda threads: SimpleNamespace(session=session),
    )
    parity: dict[str, GraphParity] = {}
    exporter._compare_graphs(bundle, TOLERANCES["fp32"], parity, lambda stage: None)
    assert devices == [device]  # graphs that may be quantized again need the weights
    assert parity["half"].max_abs_error < 1e-5


@pytest.mark.parametrize(
    ("parameters", "precision", "blocks", "side"),
    [
        (LARGE + 1, "fp32", 4, 32),
        (LARGE + 1, "fp16", 4, 64),
        (LARGE + 1, "int8", 4, 64),
        (LARGE + 1, "fp32", 7, 64),  # half the side would leave half a position in the middle block
        (LARGE, "fp32", 4, 64),
    ],
)
def test_workload_halves_images_of_large_models_in_fp32(
    parameters: int, precision: str, blocks: int, side: int
) -> None:
    config = SimpleNamespace(sample_size=64, block_out_channels=(320,) * blocks)
    unet = SimpleNamespace(config=config, num_parameters=lambda: parameters)
    checkpoint: Any = SimpleNamespace(unet=unet, is_transformer=False)
    assert workload_for(checkpoint, precision).latent_side == side


@pytest.mark.parametrize(
    ("graph", "native", "largest"), [("unet", 64, 64**2), ("unet", 16, 512), ("vae_decoder", 64, 512)]
)
def test_random_calls_include_the_native_size_of_the_unet(graph: str, native: int, largest: int) -> None:
    sizes = {"height": native, "width": native}
    spec = dataclasses.replace(
        SPEC, name=graph, typical_sizes=sizes, example=lambda batch, scale: (torch.zeros(batch, 1, scale * 16, 16),)
    )
    assert max(call[0][0].numel() for call in random_calls(spec)) == largest


# --- images and search -----------------------------------------------------------------------------------------------


def generate_gray(level: int) -> Any:
    """Return a stand-in for `Generator.generate` whose images have one brightness."""
    return lambda prompts, **options: [Image.new("RGB", (8, 8), (level,) * 3) for _ in prompts]


def encoder_of(images: np.ndarray = UNIT) -> Any:
    """Return a stand-in for `Encoder` with fixed embeddings."""
    return SimpleNamespace(encode_texts=lambda texts: UNIT, encode_images=lambda _: images)


@pytest.mark.parametrize(
    ("level", "agreement", "message"),
    [
        (0, 1.0, "the image of 'a' is black"),
        (120, 1.0, r"images diverge from diffusers: PSNR 28\.1 dB, required ≥ 45 dB\. Install the package versions"),
        (130, 1.03, r"agreement of images and prompts diverges from PyTorch: 1\.000 instead of 1\.030, allowed ± 2%"),
    ],
)
def test_images_that_diverge_are_refused(level: int, agreement: float, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        compare_images(generate_gray(level), encoder_of(), gray_reference(agreement=agreement), TOLERANCES["fp32"])


def test_failed_generation_is_an_export_error() -> None:
    def fail(prompts: Any, **options: Any) -> Any:
        raise GenerationError("latents are not finite")

    with pytest.raises(ExportError, match=r"cannot generate images: latents are not finite\. If a value overflowed"):
        compare_images(fail, encoder_of(), gray_reference(), TOLERANCES["fp16"])


def test_equal_results_give_the_evidence() -> None:
    image = compare_images(generate_gray(130), encoder_of(), gray_reference(), TOLERANCES["int8"])
    assert image == ImageParity(100.0, 25.0, 1.0, 1.0, images=2, steps=4, resolution=8)
    search = compare_search(encoder_of(), gray_reference(), TOLERANCES["int8"])
    assert search == SearchParity(1.0, 1.0, pairs=2)
    embeddings = compare_embeddings(encoder_of(), gray_reference(), TOLERANCES["int8"])
    assert embeddings == EmbeddingParity(1.0, 1.0, 0.98, texts=2, images=2)
    graphs = {"unet": GraphParity(1e-6, 1.0, 1e-4, 0.999)}
    evidence = Evidence(graphs, image, search, embeddings, devices={"cuda": {}})
    report = evidence.to_json()
    assert report.keys() == {"unet", "image", "search", "embeddings", "cuda"}
    assert report["unet"] == {"max_abs_error": 1e-6, "cosine": 1.0, "tolerance": 1e-4, "min_cosine": 0.999}


def test_search_that_finds_less_is_refused() -> None:
    with pytest.raises(ToleranceError, match=r"R@1 0\.0% instead of 100\.0% over 2 pairs, allowed − 0\.5 points") as e:
        compare_search(encoder_of(UNIT[::-1]), gray_reference(), TOLERANCES["int8"])
    assert "image_encoder" in e.value.graphs


def test_embedding_that_diverges_is_refused() -> None:
    turned = UNIT + np.float32([[0, 0, 0, 0], [0.02, 0, 0, 0]])
    turned /= np.linalg.norm(turned, axis=1, keepdims=True)
    message = (
        r"image '8 x 8 pixels' diverges from transformers: cosine 0\.9998, required ≥ 0\.9999\. Install the package"
    )
    with pytest.raises(ToleranceError, match=message) as error:
        compare_embeddings(encoder_of(turned), gray_reference(), TOLERANCES["fp32"])
    assert error.value.graphs == ("image_encoder",)
    assert compare_embeddings(encoder_of(turned), gray_reference(), TOLERANCES["fp16"]).image_cosine < 0.9999


def test_psnr() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr_db(black, white) == 0
    assert psnr_db(black, black) == 100
    assert psnr_db(black, black + np.uint8(1)) == pytest.approx(48.13, abs=0.01)
