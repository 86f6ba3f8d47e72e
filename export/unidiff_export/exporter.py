"""A checkpoint to a verified bundle: lower, write, compare with PyTorch, put in place."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from unidiff_sdk.errors import ExportError, ProviderError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import Graph, Manifest
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

from .bundle_folder import (
    folder_size,
    graph_files,
    new_folder,
    plain_config,
    rewrite_graph,
    write_graph,
    write_pipeline_files,
)
from .graphs.lowering import GraphSpec, graph_specs, lower
from .graphs.passes import rewrite_for_cuda
from .graphs.precision import overflows_half, store_halves
from .manifest import build_manifest, describe_graph, describe_model, sampler_defaults, write_manifest
from .options import CONTRIB, TARGETS, check_options
from .quantization.calibration import PROMPTS, Samples, calibrate, draw, effort_for, read_samples
from .quantization.policy import Int8Policy
from .quantization.qdq import quantize
from .verification import (
    TOLERANCES,
    GraphParity,
    ImageParity,
    Reference,
    SearchParity,
    Tolerance,
    ToleranceError,
    calls_of,
    compare_graph,
    compare_images,
    compare_search,
    make_reference,
    reference_scheduler,
    seen_calls,
)


@dataclass(frozen=True)
class GraphReport:
    """One graph of an exported bundle. int8: what is quantized of it (see Int8Policy.describe), or None."""

    name: str
    precision: str
    attention_nodes: int
    bytes: int
    parity: GraphParity
    int8: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Export:
    """What an export made: the bundle's folder, the evidence, its size, the time and the memory that it took."""

    path: Path
    graphs: tuple[GraphReport, ...]
    image: ImageParity
    search: SearchParity
    seconds: float
    bytes: int
    peak_bytes: int


def export_bundle(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    *,
    clip: str | Path | None = None,
    precision: str = "fp32",
    target: str = "cpu",
    calibration: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Export:
    """Export a checkpoint as an ONNX bundle in the new folder `out`, verified against PyTorch.

    Args:
        checkpoint: a checkpoint folder, its name, one already loaded, or a diffusers Stable Diffusion (folder or hub
            id).
        out: the bundle's folder; it appears only once everything has been verified.
        clip: for a Stable Diffusion that has no CLIP beside it, or instead of its own: see `load_base`.
        precision: "fp32", "fp16" or "int8". All graphs keep float32 inputs and outputs. An fp16 graph whose
            intermediate results would overflow stays fp32, and layers that 8 bits do not suffice for are kept back, as
            the graph's entry in the manifest says.
        target: what the graphs are made for, a name in `TARGETS`.
        calibration: a catalog on disk, of whose captions and pictures int8 learns what the layers see, and on which
            search is judged; by default the captions that the checkpoint records and what is drawn of them.
        overwrite: replace a bundle that is at `out` already.
        progress: called with one line at the start of each stage.

    Raises:
        ExportError: the checkpoint cannot be exported, or the result is too far from PyTorch. `out` is untouched.
        CheckpointError: the checkpoint is missing or incomplete.
        DataError: `calibration` is no catalog.
        OptionError: an option has an unknown value.
    """
    check_options(precision, target)
    say = progress or (lambda line: None)
    start, out = time.perf_counter(), Path(out).absolute()

    with _disk_errors(out), new_folder(out, overwrite=overwrite) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the inputs of tracing and comparing

        # 1. Load
        say("loading the checkpoint")
        loaded = checkpoint if isinstance(checkpoint, Checkpoint) else _load(checkpoint, clip)
        specs = graph_specs(loaded)

        # 2. What PyTorch draws and finds
        effort = effort_for(loaded, precision)
        samples = read_samples(loaded, calibration, effort.pairs, default=() if precision == "int8" else PROMPTS)
        judged, learned = samples.split(effort.calibration if precision == "int8" else 0)
        if precision == "int8" and not learned.captions:
            raise ExportError(
                f"{loaded.path} records fewer than 2 captions, and int8 needs some to learn from: give "
                "--calibration DATA, a folder of your pictures with captions"
            )
        say("drawing with diffusers")
        reference = make_reference(loaded, specs, judged, effort, sampler_defaults(loaded))
        policy = None
        if precision == "int8":
            say("learning what the layers see")
            policy = _learn(loaded, specs, learned, reference)

        # 3. Lower and write
        work = _Workshop(folder, loaded, precision, target, policy, reference, say)
        for spec in specs:
            work.make(spec)
        write_pipeline_files(loaded, folder)
        model = describe_model(loaded)

        def describe() -> Manifest:
            manifest = build_manifest(
                model, folder, name=out.name, graphs=work.graphs, precision=precision, target=target
            )
            write_manifest(folder, manifest)
            return manifest

        # 4. Verify; for int8, keep back what the evidence forbids
        parity: dict[str, GraphParity] = {}

        def compare() -> tuple[ImageParity, SearchParity]:
            bundle = _compare_graphs(folder, specs, reference, parity, work.graphs, say)
            if policy is None and loaded is not checkpoint:
                _free_weights(loaded)  # no graph is made anew, and the runtime is about to hold all of them
            return _compare_whole(bundle, reference, TOLERANCES[precision], say)

        while True:
            manifest = describe()
            try:
                image, search = compare()
                break
            except ToleranceError as failure:
                changed = policy.relax(failure.graphs) if policy else []
                if not changed:
                    raise
                for spec in specs:
                    if spec.name in changed:
                        parity.pop(spec.name, None)
                        work.make(spec)

        # 5. Put the kernels in that only a GPU has
        on_gpu: dict[str, Any] = {}
        if TARGETS[target].channels_last:
            work.put_channels_last()
            manifest = describe()
            on_gpu = _compare_on_gpu(folder, reference, say)

        # 6. Record
        seconds, peak = time.perf_counter() - start, peak_bytes()
        figures = {name: asdict(of_graph) for name, of_graph in parity.items()}
        figures |= {"image": asdict(image), "search": asdict(search)} | on_gpu
        cost = {"seconds": round(seconds, 1), "peak_mib": peak >> 20}
        write_manifest(folder, replace(manifest, parity=figures, export=cost))

    reports = tuple(
        GraphReport(
            name=spec.name,
            precision=work.graphs[spec.name].precision,
            attention_nodes=work.graphs[spec.name].attention_nodes or 0,
            bytes=work.graphs[spec.name].bytes or 0,
            parity=parity[spec.name],
            int8=work.graphs[spec.name].int8,
        )
        for spec in specs
    )
    return Export(out, reports, image, search, seconds, folder_size(out), peak)


def _load(path: str | Path, clip: str | Path | None) -> Checkpoint:
    """A checkpoint; or a Stable Diffusion, which says what it lacks if `clip` does not name its CLIP."""
    return load_base(path, clip)


def _learn(checkpoint: Checkpoint, specs: Sequence[GraphSpec], samples: Samples, reference: Reference) -> Int8Policy:
    """Draw other captions than those of the evidence, and look at what the layers see."""
    scheduler, _ = reference_scheduler(reference.sampler, checkpoint)
    draw_it = partial(
        draw,
        checkpoint,
        scheduler,
        side=checkpoint.unet.config.sample_size,
        seed=1,
        steps=reference.steps,
        guidance_scale=reference.guidance_scale,
    )
    return Int8Policy(specs, calibrate(checkpoint, specs, samples, draw_it))


class _Workshop:
    """Makes the graphs of a bundle in `folder`, and makes one again where the policy has changed.

    Attributes:
        graphs: the manifest's entries of those that are made.
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        precision: str,
        target: str,
        policy: Int8Policy | None,
        reference: Reference,
        say: Callable[[str], None],
    ) -> None:
        self.graphs: dict[str, Graph] = {}
        self._folder, self._checkpoint, self._say = folder, checkpoint, say
        self._precision, self._target, self._policy, self._reference = precision, target, policy, reference
        self._lowered: dict[str, ir.Model] = {}  # for int8, as floats: quantized anew each time

    def make(self, spec: GraphSpec) -> None:
        """Lower `spec`, write its folder and its entry."""
        self._say(f"lowering {spec.name}")
        model, used, quantized = self._lower(spec)
        folder = self._folder / spec.name
        write_graph(model, folder, _config(self._checkpoint, spec.name))
        self.graphs[spec.name] = replace(
            describe_graph(model, spec, used, self._target),
            bytes=_graph_bytes(folder),
            int8=self._policy.describe(spec.name, quantized) if self._policy else None,
        )
        del model
        gc.collect()  # graphs are full of cycles, and each holds a copy of its weights

    def put_channels_last(self) -> None:
        """Rewrite the graphs that are there for CUDA's kernels, with their entries."""
        for name, graph in self.graphs.items():
            folder = self._folder / name
            if rewrite_graph(folder, rewrite_for_cuda):
                self.graphs[name] = replace(graph, channels_last=True, bytes=_graph_bytes(folder))

    def _lower(self, spec: GraphSpec) -> tuple[ir.Model, str, list[str]]:
        """The graph, the precision it got, and the layers that are quantized.

        The precision is fp32 where half precision would overflow, or 8 bits suffice nowhere.
        """
        target = TARGETS[self._target]
        if self._precision == "fp16":
            calls = [spec.example(1, 1), *seen_calls(spec, self._reference)]
            if not any(overflows_half(spec.module, inputs) for inputs in calls):
                return lower(spec, target, half=True), "fp16", []
        quantized: list[str] = []
        if self._policy:
            if spec.name not in self._lowered:
                self._lowered[spec.name] = lower(spec, target)
            model = self._lowered[spec.name].clone()
            quantized = quantize(model, self._policy.ranges(spec.name), contrib=CONTRIB in target.domains)
        else:
            model = lower(spec, target)
        store_halves(model)
        return model, "int8" if quantized else "fp32", quantized


def _graph_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in graph_files(folder))


def _compare_graphs(
    folder: Path,
    specs: Sequence[GraphSpec],
    reference: Reference,
    parity: dict[str, GraphParity],
    graphs: Mapping[str, Graph],
    say: Callable[[str], None],
) -> Bundle:
    """Compare the graphs that `parity` lacks with PyTorch, into it. Raises ToleranceError at the first too far off.

    Returns the bundle, with the UNet loaded if it was compared: of all graphs it takes longest.
    """
    whole = _opened(folder)
    for spec in sorted(specs, key=lambda spec: spec.name == "unet"):
        if spec.name not in parity:
            say(f"comparing {spec.name} with PyTorch")
            used = graphs[spec.name].precision
            calls = calls_of(spec, used, reference)
            # The others each in a bundle of its own, so that a graph's memory is free before the next takes its.
            bundle = whole if spec.name == "unet" else _opened(folder)
            parity[spec.name] = compare_graph(bundle.session(spec.name), spec, TOLERANCES[used], calls)
    return whole


def _compare_whole(
    bundle: Bundle, reference: Reference, tolerance: Tolerance, say: Callable[[str], None]
) -> tuple[ImageParity, SearchParity]:
    """Compare whole pictures, then search. Raises ToleranceError at the first that is too far from PyTorch's."""
    say("comparing pictures with diffusers")
    image = compare_images(bundle, reference, tolerance)
    say("comparing search with PyTorch")
    return image, compare_search(bundle, reference, tolerance)


def _compare_on_gpu(folder: Path, reference: Reference, say: Callable[[str], None]) -> dict[str, Any]:
    """The same on the GPU that the graphs are for: an entry of the manifest; none where this machine has no such.

    By the tolerance of half precision: a GPU rounds what it convolves and multiplies in float32 to TF32, which has as
    many digits.
    """
    bundle = Bundle.open(folder, verify=False, device="cuda")
    try:
        bundle.session("unet")
    except ProviderError:
        say("not comparing on a GPU: there is none that ONNX Runtime can use")
        return {}
    say("comparing on the GPU")
    image, search = _compare_whole(bundle, reference, TOLERANCES["fp16"], say)
    return {"cuda": {"image": asdict(image), "search": asdict(search)}}


def _opened(folder: Path) -> Bundle:
    return Bundle.open(folder, verify=False, threads=torch.get_num_threads())


def _free_weights(checkpoint: Checkpoint) -> None:
    """Give back the memory of all weights; configurations and tokenizers stay."""
    for part in (checkpoint.unet, checkpoint.vae, checkpoint.clip, checkpoint.text_encoder):
        part.to("meta")


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Say in one line that the disk refused: full, read-only, no permission."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}; nothing was left behind") from error


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
