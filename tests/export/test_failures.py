"""What must not be exported is refused in one line, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from PIL import Image

import unidiff_sdk.inference.encoder
from unidiff_export import Export, GraphReport, export_bundle, exporter
from unidiff_export.cli import main
from unidiff_export.graphs.lowering import GraphSpec, graph_specs, lower
from unidiff_export.quantization.calibration import LARGE, Drawing, Samples, effort_for
from unidiff_export.verification import (
    TOLERANCES,
    GraphParity,
    ImageParity,
    Reference,
    SearchParity,
    ToleranceError,
    compare_graph,
    compare_images,
    compare_search,
    psnr_db,
    random_calls,
)
from unidiff_sdk.errors import CheckpointError, ExportError
from unidiff_sdk.generation import generator
from unidiff_sdk.inference.manifest import TensorSpec
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

SPEC = GraphSpec("half", torch.nn.Tanh(), 0, {"x": {}}, ("y",), lambda batch, scale: (torch.ones(batch, scale),))


class Session:
    """A session of a graph whose output y is `result(x)`."""

    inputs: ClassVar[dict[str, TensorSpec]] = {"x": TensorSpec("float32", ("batch", 1))}
    outputs: ClassVar[dict[str, TensorSpec]] = {"y": TensorSpec("float32", ("batch", 1))}
    providers, captured = ("NumPy",), False

    def __init__(self, result: Any) -> None:
        self.result = result

    def run(self, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        return {"y": self.result(feeds["x"])}


def test_graph_that_agrees_carries_its_figures() -> None:
    parity = compare_graph(Session(np.tanh), SPEC, TOLERANCES["fp32"])
    assert parity.max_abs_error < 1e-6
    assert parity.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: np.tanh(x) + 0.01, r"half differs from PyTorch by up to 0.01 \(allowed: 1e-04\); install"),
        (
            lambda x: x * np.float32(np.nan),
            "half's y is not finite, where PyTorch's is: a number overflowed; try --fp32",
        ),
        (lambda x: x[:1, :1], r"half's y has shape \(1, 1\), but PyTorch's has \(3, 1\)"),
    ],
)
def test_graph_that_disagrees_is_refused_with_the_figure(result: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        compare_graph(Session(result), SPEC, TOLERANCES["fp32"])


def test_checkpoint_with_nan_weights_is_told_from_a_bad_export() -> None:
    spec = dataclasses.replace(SPEC, example=lambda batch, scale: (torch.full((batch, scale), torch.nan),))
    with pytest.raises(ExportError, match="not finite in PyTorch already: the checkpoint is broken"):
        compare_graph(Session(np.tanh), spec, TOLERANCES["fp32"])


@pytest.mark.parametrize(
    ("parameters", "precision", "blocks", "side"),
    [
        (LARGE + 1, "fp32", 4, 32),
        (LARGE + 1, "fp16", 4, 64),
        (LARGE + 1, "int8", 4, 64),
        (LARGE + 1, "fp32", 7, 64),  # halved, its middle would have half a position
        (LARGE, "fp32", 4, 64),
    ],
)
def test_only_pictures_of_large_models_in_fp32_are_halved(
    parameters: int, precision: str, blocks: int, side: int
) -> None:
    config = SimpleNamespace(sample_size=64, block_out_channels=(320,) * blocks)
    checkpoint: Any = SimpleNamespace(unet=SimpleNamespace(config=config, num_parameters=lambda: parameters))
    assert effort_for(checkpoint, precision).side == side


@pytest.mark.parametrize(
    ("graph", "native", "largest"), [("unet", 64, 64**2), ("unet", 16, 512), ("vae_decoder", 64, 512)]
)
def test_unet_is_compared_over_as_many_positions_as_it_was_made_for(graph: str, native: int, largest: int) -> None:
    usual = {"height": native, "width": native}
    spec = dataclasses.replace(
        SPEC, name=graph, usual=usual, example=lambda batch, scale: (torch.zeros(batch, 1, scale * 16, 16),)
    )
    assert max(call[0][0].numel() for call in random_calls(spec)) == largest


def reference(**changed: Any) -> Reference:
    """A drawing of two grey pictures, each the only right answer to its caption."""
    unit = np.eye(2, 4, dtype=np.float32)
    pictures = (np.full((8, 8, 3), 130, np.uint8),) * 2
    noise = np.zeros((2, 4, 4, 4), np.float32)
    drawing = Drawing(("a", "b"), noise, torch.zeros(2, 4, 4, 4), pictures, ())
    searched = Samples(("a", "b"), pictures)
    given = Reference(drawing, "dpm++2m", 4, 2.0, searched, (unit, unit), agreement=1.0, inputs={})
    return dataclasses.replace(given, **changed)


def runtime(monkeypatch: pytest.MonkeyPatch, level: int, images: Any = None) -> None:
    """A runtime that draws pictures of one level, and embeds whatever it is given as `images`."""
    drawn = [Image.new("RGB", (8, 8), (level,) * 3)] * 2
    unit = np.eye(2, 4, dtype=np.float32)
    found = unit if images is None else images
    encoder = SimpleNamespace(encode_texts=lambda texts: unit, encode_images=lambda pictures: found)
    monkeypatch.setattr(generator, "Generator", lambda bundle: SimpleNamespace(generate=lambda *_, **__: drawn))
    monkeypatch.setattr(unidiff_sdk.inference.encoder, "Encoder", lambda bundle: encoder)


@pytest.mark.parametrize(
    ("level", "agreement", "message"),
    [
        (0, 1.0, "is black"),
        (120, 1.0, r"only \d+\.\d dB PSNR .* \(at least 45 dB asked\); install the package versions"),
        (130, 1.03, r"agree with their prompts by 1.000 on average, PyTorch's by 1.030 \(within 2% asked\)"),
    ],
)
def test_wrong_pictures_are_refused(
    monkeypatch: pytest.MonkeyPatch, level: int, agreement: float, message: str
) -> None:
    runtime(monkeypatch, level)
    bundle: Any = None
    with pytest.raises(ExportError, match=message):
        compare_images(bundle, reference(agreement=agreement), TOLERANCES["fp32"])


def test_equal_pictures_carry_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(monkeypatch, 130)
    bundle: Any = None
    image = compare_images(bundle, reference(), TOLERANCES["int8"])
    assert image == ImageParity(100.0, 25.0, 1.0, 1.0, pictures=2, steps=4, resolution=8)
    assert compare_search(bundle, reference(), TOLERANCES["int8"]) == SearchParity(1.0, 1.0, pairs=2)


def test_search_that_finds_less_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime(monkeypatch, 130, images=np.eye(2, 4, dtype=np.float32)[::-1])
    bundle: Any = None
    with pytest.raises(
        ToleranceError, match=r"R@1 over 2 pairs is 0.0%, but PyTorch's is 100.0% .*; try|calibrate"
    ) as e:
        compare_search(bundle, reference(), TOLERANCES["int8"])
    assert "image_encoder" in e.value.graphs


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
        ({"cross_attention_dim": 768}, "states of width 768, but text_encoder/ returns 32: they belong to different"),
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


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to write on past `size` bytes of a file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_refuses_in_the_middle_of_a_graph_leaves_nothing(random_checkpoint: Path, tmp_path: Path) -> None:
    with files_no_larger_than(50_000), pytest.raises(ExportError, match=r"cannot write .*out: .*; nothing was left"):
        export_bundle(random_checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_nothing(random_checkpoint: Path, tmp_path: Path) -> None:
    # A shell starts what runs in its background with Ctrl-C ignored, this test too.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = heard + "from unidiff_export.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, random_checkpoint, "-o", tmp_path / "out"], stderr=subprocess.PIPE, text=True
    )
    ends = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*")) and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.partial-*"))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in said and len(said.strip().splitlines()) <= 1


def test_a_missing_part_is_named_in_one_line(random_checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(random_checkpoint, tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    result = CliRunner().invoke(main, [str(broken), "-o", str(tmp_path / "out")])
    shutil.rmtree(broken / "clip")
    no_clip = CliRunner().invoke(main, [str(broken), "-o", str(tmp_path / "out")])
    assert no_clip.stderr.startswith(f"Error: {broken} has no CLIP beside it: name one with --clip")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {broken} is not a complete checkpoint, it lacks vae/config.json (the VAE)")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("enlarged", "expected"), [(1.0, "fp16"), (1e6, "fp32")])
def test_what_overflows_half_precision_stays_single(
    random_checkpoint: Path, tmp_path: Path, enlarged: float, expected: str
) -> None:
    """As the VAE of Stable Diffusion XL does: values of a million in the middle, an ordinary picture at the end."""
    checkpoint = load_checkpoint(random_checkpoint)
    with torch.no_grad():
        for tensor in checkpoint.vae.decoder.conv_in.parameters():
            tensor.mul_(1e6)
    made = {}
    for spec in graph_specs(checkpoint):
        if spec.name.startswith("vae"):
            (example,) = spec.example(1, 1)
            seen: Any = SimpleNamespace(inputs={spec.name: ((enlarged * example,),)})
            work = exporter._Workshop(tmp_path, checkpoint, "fp16", "cpu", None, seen, lambda line: None)
            work.make(spec)
            made[spec.name] = work.graphs[spec.name].precision
    assert made == {"vae_decoder": "fp32", "vae_encoder": expected}


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
        int8 = {"layers": 83, "multiply_adds": 0.9804, "kept_back": []}
        graph = GraphReport("unet", "fp32", 8, 12_900_000, GraphParity(1.7e-6, 0.9999999, 1e-4, 0.99), int8)
        image = ImageParity(89.0, 45.0, 0.911, 0.912, pictures=16, steps=12, resolution=64)
        search = SearchParity(0.9375, 0.95, pairs=200)
        return Export(tmp_path / "shop", (graph,), image, search, 31.26, 21_217_000, 885_400_000)

    monkeypatch.setattr(exporter, "export_bundle", export)
    yield options


def test_cli_shows_the_evidence_and_ends_with_the_figures(exported: dict[str, Any], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tiny", "-o", str(tmp_path / "shop")])
    assert result.exit_code == 0, result.output
    assert (exported["precision"], exported["target"], exported["overwrite"]) == ("fp32", "cpu", False)
    assert "1.7e-06" in result.stdout
    for figure in ("98.0%", "89.0 dB", "0.911", "0.912", "93.8%", "95.0%", "200 pairs", "worst of 16 of 64 px"):
        assert figure in result.stdout
    said = f"fp32 bundle in 31.3 s, 21.2 MB, with at most 885.4 MB of memory: {tmp_path / 'shop'}"
    assert result.stdout.splitlines()[-1] == said


def test_cli_options(exported: dict[str, Any], tmp_path: Path) -> None:
    CliRunner().invoke(main, ["tiny", "-o", str(tmp_path), "--fp16", "--target", "cpu", "--overwrite"])
    assert (exported["precision"], exported["target"], exported["overwrite"]) == ("fp16", "cpu", True)
    result = CliRunner().invoke(main, ["tiny", "-o", str(tmp_path), "--target", "tpu"])
    assert result.exit_code == 2
    assert "'tpu' is not one of 'cpu', 'portable', 'cuda', 'tensorrt'" in result.stderr
