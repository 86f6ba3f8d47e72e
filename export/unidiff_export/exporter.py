"""A checkpoint to a verified bundle: lower, write, compare with PyTorch, put in place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from unidiff_sdk.bundle import Bundle
from unidiff_sdk.errors import ExportError
from unidiff_sdk.training.checkpoint import Checkpoint, load_checkpoint

from .folder import (
    folder_size,
    new_folder,
    plain_config,
    write_graph,
    write_pipeline_files,
)
from .lowering import GraphSpec, graph_specs, lower
from .manifest import build_manifest, describe_graph, write_manifest
from .options import TARGETS, Target, check_options
from .precision import overflows_half, store_halves
from .verification import TOLERANCES, GraphParity, ImageParity, compare_graph, compare_images


@dataclass(frozen=True)
class GraphReport:
    """One graph of an exported bundle."""

    name: str
    precision: str
    attention_nodes: int
    bytes: int
    parity: GraphParity


@dataclass(frozen=True)
class Export:
    """What an export made: the bundle's folder, the evidence, the time it took and its size."""

    path: Path
    graphs: tuple[GraphReport, ...]
    image: ImageParity
    seconds: float
    bytes: int


def export_bundle(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    precision: str = "fp32",
    target: str = "cpu",
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Export:
    """Export a checkpoint as an ONNX bundle in the new folder `out`, verified against PyTorch.

    Args:
        checkpoint: a checkpoint folder, its name, or one already loaded.
        out: the bundle's folder; it appears only once everything has been verified.
        precision: "fp32" or "fp16". fp16 graphs keep float32 inputs and outputs, and a graph whose intermediate
            results would overflow stays fp32, as its entry in the manifest says.
        target: what the graphs are made for, a name in `TARGETS`.
        overwrite: replace a bundle that is at `out` already.
        progress: called with one line at the start of each stage.

    Raises:
        ExportError: the checkpoint cannot be exported, or the result is too far from PyTorch. `out` is untouched.
        CheckpointError: the checkpoint is missing or incomplete.
        OptionError: an option has an unknown value.
    """
    check_options(precision, target)
    say = progress or (lambda line: None)
    start, out = time.perf_counter(), Path(out).absolute()

    with _disk_errors(out), new_folder(out, overwrite=overwrite) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the inputs of tracing and comparing

        # 1. Load
        say("loading the checkpoint")
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else load_checkpoint(checkpoint)
        specs = graph_specs(loaded)

        # 2. Lower and write
        graphs: dict[str, dict[str, Any]] = {}
        for spec in specs:
            say(f"lowering {spec.name}")
            model, used = _lower_in(spec, precision, TARGETS[target])
            write_graph(model, folder / spec.name, _config(loaded, spec.name))
            graphs[spec.name] = describe_graph(model, spec, used, target)
        write_pipeline_files(loaded, folder)
        manifest = build_manifest(loaded, folder, name=out.name, graphs=graphs, precision=precision, target=target)
        write_manifest(folder, manifest)

        # 3. Verify
        bundle = Bundle.open(folder, threads=torch.get_num_threads())
        parity = {}
        for spec in specs:
            say(f"comparing {spec.name} with PyTorch")
            tolerance = TOLERANCES[graphs[spec.name]["precision"]].max_abs_error
            parity[spec.name] = compare_graph(bundle.session(spec.name), spec, tolerance)
        say("comparing pictures with diffusers")
        image = compare_images(bundle, loaded, TOLERANCES[precision].image_psnr_db)

        # 4. Record
        manifest["parity"] = {name: asdict(figures) for name, figures in parity.items()}
        manifest["parity"]["image"] = asdict(image)
        write_manifest(folder, manifest)

    reports = tuple(
        GraphReport(
            name=spec.name,
            precision=graphs[spec.name]["precision"],
            attention_nodes=graphs[spec.name]["attention_nodes"],
            bytes=folder_size(out / spec.name),
            parity=parity[spec.name],
        )
        for spec in specs
    )
    return Export(out, reports, image, time.perf_counter() - start, folder_size(out))


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Say in one line that the disk refused: full, read-only, no permission."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}; nothing was left behind") from error


def _lower_in(spec: GraphSpec, precision: str, target: Target) -> tuple[ir.Model, str]:
    """The graph, and the precision it got: fp32 where half precision would overflow."""
    if precision == "fp16" and not overflows_half(spec.module, spec.example(1, 1)):
        return lower(spec, target, half=True), "fp16"
    model = lower(spec, target)
    store_halves(model)
    return model, "fp32"


def _config(checkpoint: Checkpoint, graph: str) -> dict[str, Any]:
    """The config.json that stands beside a graph: that of the model it came from."""
    configs = {
        "text_encoder": checkpoint.text_encoder.config,
        "clip_text_encoder": checkpoint.clip.config.text_config,
        "unet": checkpoint.unet,
        "vae_decoder": checkpoint.vae,
        "vae_encoder": checkpoint.vae,
        "image_encoder": checkpoint.clip.config.vision_config,
    }
    return plain_config(configs[graph])
