"""Checkpoints that cannot be exported are refused, and a failed export leaves no files."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from support.references import gray_reference

from unidiff_export import export_bundle
from unidiff_export.bundle.graph_writer import GraphWriter, graph_configs
from unidiff_export.graphs.lowering import graph_specs, lower
from unidiff_sdk.errors import CheckpointError, ExportError
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint


def test_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="There is no checkpoint folder"):
        export_bundle(tmp_path / "nowhere", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_attention_without_its_operator_is_refused(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.clip.set_attn_implementation("eager")
    image_encoder = graph_specs(checkpoint)[-1]
    with pytest.raises(ExportError, match=r"image_encoder has 2 attention layers but 0 Attention nodes.*sdpa"):
        lower(image_encoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"addition_embed_type": "text_time"}, r"\(addition_embed_type text_time\), as SDXL"),
        ({"in_channels": 9}, r"\(in_channels 9: inpainting\), as SDXL without"),
        ({"num_class_embeds": 10}, r"\(num_class_embeds 10\)"),
        ({"class_embed_type": "timestep", "in_channels": 7}, r"\(class_embed_type timestep, in_channels 7: ups"),
        ({"time_cond_proj_dim": 256}, r"\(time_cond_proj_dim 256\)"),
        ({"cross_attention_dim": 768}, "states of width 768, but text_encoder/ returns 32: they belong to different"),
    ],
)
def test_other_architectures_are_refused(random_checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.unet.register_to_config(**changes)
    with pytest.raises(ExportError, match=message):
        graph_specs(checkpoint)


@pytest.mark.parametrize(
    ("exception", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(28, "No space left on device"), ExportError, "cannot write .*out: No space left on device"),
    ],
)
def test_failure_between_the_stages_leaves_nothing(
    random_checkpoint: Path, tmp_path: Path, exception: BaseException, raised: type[BaseException], message: str
) -> None:
    stages: list[str] = []

    def fail_at_lowering(stage: str) -> None:
        stages.append(stage)
        if stage == "Lowering unet":
            raise exception

    with pytest.raises(raised, match=message):
        export_bundle(random_checkpoint, tmp_path / "out", progress=fail_at_lowering)
    assert stages[-2:] == ["Lowering text_encoder", "Lowering unet"]
    assert not list(tmp_path.iterdir())


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse to write beyond `size` bytes of a file, like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_leaves_nothing(random_checkpoint: Path, tmp_path: Path) -> None:
    with (
        files_no_larger_than(50_000),
        pytest.raises(ExportError, match=r"cannot write .*out: .*\. No partial bundle was left"),
    ):
        export_bundle(random_checkpoint, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_interrupted_export_leaves_nothing(random_checkpoint: Path, tmp_path: Path) -> None:
    # A shell starts background processes with SIGINT ignored, and this test may run in one.
    restore = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code = restore + "from unidiff_export.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, random_checkpoint, "-o", tmp_path / "out"], stderr=subprocess.PIPE, text=True
    )
    ends = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*")) and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.05)
    assert list(tmp_path.glob(".out.partial-*"))
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in errors and len(errors.strip().splitlines()) <= 1


@pytest.mark.parametrize(("factor", "expected"), [(1.0, "fp16"), (1e6, "fp32")])
def test_graph_that_overflows_half_precision_stays_fp32(
    random_checkpoint: Path, tmp_path: Path, factor: float, expected: str
) -> None:
    """Like the VAE of Stable Diffusion XL: values of a million inside, an ordinary image as the result."""
    checkpoint = load_checkpoint(random_checkpoint)
    with torch.no_grad():
        for tensor in checkpoint.vae.decoder.conv_in.parameters():
            tensor.mul_(1e6)
    precisions = {}
    for spec in graph_specs(checkpoint):
        if spec.name.startswith("vae"):
            (example,) = spec.example(1, 1)
            reference = gray_reference(inputs={spec.name: ((factor * example,),)})
            writer = GraphWriter(tmp_path, graph_configs(checkpoint), "fp16", "cpu", None, reference, lambda line: None)
            writer.write(spec)
            precisions[spec.name] = writer.graphs[spec.name].precision
    assert precisions == {"vae_decoder": "fp32", "vae_encoder": expected}
