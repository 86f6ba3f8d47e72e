"""What must not be exported is refused in one line, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from PIL import Image

from unidiff_export import Export, GraphReport, export_bundle, exporter, verification
from unidiff_export.cli import main
from unidiff_export.lowering import GraphSpec, graph_specs, lower
from unidiff_export.verification import GraphParity, ImageParity, compare_graph, compare_images, psnr_db
from unidiff_sdk import generator
from unidiff_sdk.errors import CheckpointError, ExportError
from unidiff_sdk.training.checkpoint import load_checkpoint

SPEC = GraphSpec("half", torch.nn.Tanh(), 0, {"x": {}}, ("y",), lambda batch, scale: (torch.ones(batch, scale),))


class Session:
    """A graph that computes whatever it is told to."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def run(self, outputs: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [self.result(inputs["x"])]


def test_graph_that_agrees_carries_its_figures() -> None:
    parity = compare_graph(Session(np.tanh), SPEC, 1e-4)
    assert parity.max_abs_error < 1e-6
    assert parity.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: np.tanh(x) + 0.01, r"half differs from PyTorch by up to 0.01 \(allowed: 1e-04\); try"),
        (
            lambda x: x * np.float32(np.nan),
            "half's y is not finite, where PyTorch's is: a number overflowed; try --fp32",
        ),
        (lambda x: x[:1, :1], r"half's y has shape \(1, 1\), but PyTorch's has \(3, 1\)"),
    ],
)
def test_graph_that_disagrees_is_refused_with_the_figure(result: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        compare_graph(Session(result), SPEC, 1e-4)


def test_checkpoint_with_nan_weights_is_told_from_a_bad_export() -> None:
    spec = dataclasses.replace(SPEC, example=lambda batch, scale: (torch.full((batch, scale), torch.nan),))
    with pytest.raises(ExportError, match="not finite in PyTorch already: the checkpoint is broken"):
        compare_graph(Session(np.tanh), spec, 1e-4)


@pytest.mark.parametrize(
    ("level", "message"), [(0, "is black"), (120, r"only \d+\.\d dB PSNR .* \(at least 40 dB asked\)")]
)
def test_wrong_pictures_are_refused(
    random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, level: int, message: str
) -> None:
    ours = [Image.new("RGB", (8, 8), (level,) * 3)] * 2
    monkeypatch.setattr(generator, "Generator", lambda bundle: SimpleNamespace(generate=lambda *_, **__: ours))
    monkeypatch.setattr(verification, "diffusers_images", lambda *_, **__: [np.full((8, 8, 3), 130, np.uint8)] * 2)
    sampler = {"name": "dpm++2m", "steps": 4, "guidance_scale": 2.0}
    bundle: Any = SimpleNamespace(manifest={"sampler": sampler, "latent": {"channels": 4, "size": 4}})
    with pytest.raises(ExportError, match=message):
        compare_images(bundle, load_checkpoint(random_checkpoint), 40.0)


def test_psnr() -> None:
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert psnr_db(black, white) == 0
    assert psnr_db(black, black) == 100
    assert psnr_db(black, black + np.uint8(1)) == pytest.approx(48.13, abs=0.01)


def test_attention_that_is_not_one_node_is_refused(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.clip.set_attn_implementation("eager")
    image_encoder = graph_specs(checkpoint)[-1]
    with pytest.raises(ExportError, match=r"image_encoder has 2 attention layers but 0 Attention nodes.*sdpa"):
        lower(image_encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_time"}, r"\(addition_embed_type text_time\), as SDXL"),
        ({"in_channels": 9}, r"\(in_channels 9\), as SDXL, inpainting"),
        ({"num_class_embeds": 10}, r"\(num_class_embeds 10\)"),
        ({"class_embed_type": "timestep", "in_channels": 7}, r"\(class_embed_type timestep, in_channels 7\)"),
        ({"time_cond_proj_dim": 256}, r"\(time_cond_proj_dim 256\)"),
        ({"cross_attention_dim": 768}, "states of width 768, but text_encoder/ gives 32: they belong to different"),
    ],
)
def test_models_of_another_shape_are_refused(random_checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.unet.register_to_config(**changes)
    with pytest.raises(ExportError, match=message):
        graph_specs(checkpoint)


@pytest.mark.parametrize(
    ("trouble", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(28, "No space left on device"), ExportError, "cannot write .*out: No space left on device"),
    ],
)
def test_trouble_on_the_way_leaves_nothing(
    random_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise trouble

    monkeypatch.setattr(exporter, "lower", fail)
    with pytest.raises(raised, match=message):
        export_bundle(random_checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_missing_checkpoint_is_one_line_and_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        export_bundle(tmp_path / "nowhere", tmp_path / "out")
    result = CliRunner().invoke(main, [str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no checkpoint at")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """`export_bundle` replaced by one that notes its options and says that all went well."""
    options: dict[str, Any] = {}

    def export(checkpoint: str, out: Path, **given: Any) -> Export:
        options.update(given)
        graph = GraphReport("unet", "fp32", 8, 12_900_000, GraphParity(1.7e-6, 0.9999999, 1e-4))
        return Export(tmp_path / "shop", (graph,), ImageParity(89.0, 40.0), 31.26, 21_217_000)

    monkeypatch.setattr(exporter, "export_bundle", export)
    yield options


def test_cli_shows_the_evidence_and_ends_with_the_figures(exported: dict[str, Any], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tiny", "-o", str(tmp_path / "shop")])
    assert result.exit_code == 0, result.output
    assert (exported["precision"], exported["target"], exported["overwrite"]) == ("fp32", "cpu", False)
    assert "1.7e-06" in result.stdout
    assert "89.0 dB" in result.stdout
    assert result.stdout.splitlines()[-1] == f"fp32 bundle in 31.3 s, 21.2 MB: {tmp_path / 'shop'}"


def test_cli_options(exported: dict[str, Any], tmp_path: Path) -> None:
    CliRunner().invoke(main, ["tiny", "-o", str(tmp_path), "--fp16", "--target", "cpu", "--overwrite"])
    assert (exported["precision"], exported["target"], exported["overwrite"]) == ("fp16", "cpu", True)
    result = CliRunner().invoke(main, ["tiny", "-o", str(tmp_path), "--target", "tpu"])
    assert result.exit_code == 2
    assert "'tpu' is not one of 'cpu', 'portable', 'cuda', 'tensorrt'" in result.stderr
