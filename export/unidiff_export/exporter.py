"""Export a checkpoint as a verified bundle: load, generate a reference, write the graphs, verify, put in place."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import DataError, ExportError, OptionError, ProviderError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.folder.signature import read_private_key, sign_manifest
from unidiff_sdk.inference.manifest import Manifest, RerankDefaults, SwitchableLora
from unidiff_sdk.inference.schedule import replacement_notice
from unidiff_sdk.training.checkpoints.bases import load_base
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.checkpoints.encoders.search_model import load_search_model
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions, Lora

from .bundle.exported import Exported, Progress
from .bundle.files import folder_size, new_folder, write_pipeline_files
from .bundle.graph_writer import GraphWriter, graph_configs
from .bundle.manifest import build_manifest, describe_model, sampler_defaults, write_manifest
from .bundle.model_card import write_model_card
from .bundle.reranking import MAX_QUERIES, MIN_QUERIES, affordable_queries, rerank_defaults
from .bundle.search_only import export_search_model
from .bundle.switchable import check_names, compare_loras, read_loras, with_optional_inputs, write_loras
from .graphs.lowering import GraphSpec, graph_specs
from .options import TARGETS, check_options, check_switchable
from .pipeline import generate_images, load_pipeline
from .quantization.calibration import calibrate
from .quantization.policy import Int8Policy
from .reference import Reference, Samples, SearchReference, make_reference, read_samples, workload_for
from .verification import (
    TOLERANCES,
    EmbeddingParity,
    Evidence,
    GraphParity,
    ImageParity,
    SearchParity,
    Tolerance,
    ToleranceError,
    calls_for,
    compare_embeddings,
    compare_graph,
    compare_images,
    compare_search,
    expected_outputs,
    results_to_json,
)


@dataclass(frozen=True)
class GraphReport:
    """One graph of an exported bundle.

    Attributes:
        name, precision: of the graph.
        attention_nodes: number of fused attention operators.
        bytes: size of the graph and its weights.
        parity: its comparison with PyTorch.
        int8: the quantized layers, see `Int8Policy.describe`; None for other precisions.
    """

    name: str
    precision: str
    attention_nodes: int
    bytes: int
    parity: GraphParity
    int8: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Export:
    """The result of an export.

    Attributes:
        path: the bundle folder.
        graphs: the graphs, in the order of generation.
        image: the comparison of generated images with PyTorch; None without a generator.
        search: the comparison of search with PyTorch; None without a generator and without `calibration`.
        embeddings: the comparison of embeddings with PyTorch.
        seconds: duration of the export.
        bytes: size of the bundle.
        peak_bytes: peak memory of this process, without that of a forked one.
    """

    path: Path
    graphs: tuple[GraphReport, ...]
    image: ImageParity | None
    search: SearchParity | None
    embeddings: EmbeddingParity
    seconds: float
    bytes: int
    peak_bytes: int


def export_bundle(
    checkpoint: str | Path | Checkpoint | None,
    out: str | Path,
    *,
    clip: str | Path | None = None,
    variant: str | None = None,
    lora: Sequence[str | Path] = (),
    lora_switchable: bool = False,
    textual_inversion: Sequence[str | Path] = (),
    vae: str | Path | None = None,
    base_config: str | Path | None = None,
    precision: str = "fp32",
    target: str = "cpu",
    calibration: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
    tolerance: Tolerance | None = None,
    sign: str | Path | None = None,
    fork: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Export:
    """Export a checkpoint as an ONNX bundle in the new folder `out`, verified against PyTorch.

    Args:
        checkpoint: a checkpoint folder, the name of a checkpoint, a loaded checkpoint, or a pipeline of diffusers for
            Stable Diffusion 1, 2, XL or 3 (a folder, hf:org/name, or for 1 and 2 one safetensors file in the original
            layout). None: only `clip`, for a bundle that searches but has no generator.
        out: the bundle folder. It appears only after everything has been verified.
        clip: the CLIP of a Stable Diffusion pipeline, see `load_base`; without one, see `load_search_model`.
        variant: the variant of the weight files, such as "fp16". Default: the main files, or the only variant there is.
        lora: LoRA files of diffusers, peft or kohya, and adapter folders of peft, to merge: PATH or PATH:WEIGHT.
        lora_switchable: keep the LoRA files apart instead of merging them, so that each generation chooses among them
            (`generate(lora=)`) by the names of their files.
        textual_inversion: tokens to add to the prompts, in the formats of diffusers or AUTOMATIC1111: FILE or
            FILE:TOKEN.
        vae: the VAE to use instead of the checkpoint's: a diffusers folder, or a safetensors file.
        base_config: for a checkpoint in a single file, the folder of a diffusers pipeline with its configuration.
            Default: the built-in configuration of Stable Diffusion 1.5.
        precision: "fp32", "fp16" or "int8". All graphs have float32 inputs and outputs. An fp16 graph whose values
            would overflow stays fp32, and layers that are too sensitive for int8 stay float. The manifest lists both.
        target: the runtime of the graphs, a name in `TARGETS`.
        calibration: a catalog on disk with pairs to calibrate int8 and to compare search. Default: the captions that
            the checkpoint records, and images generated from them. Without a generator, int8 needs a catalog, and
            without one search is not compared.
        columns: names of columns of `calibration`, see `read_catalog`.
        overwrite: replace an existing bundle at `out`.
        tolerance: the largest deviation from PyTorch. Default: `TOLERANCES[precision]`.
        sign: a PEM file with an Ed25519 private key to sign the bundle with. `Bundle.open(…, trusted_keys=)` checks the
            signature. Needs the extra `sign`.
        fork: write the UNet or transformer of an fp32 bundle in a forked process, which uses a second core. Only for
            programs whose other threads hold no locks that PyTorch or logging needs. No effect outside Linux.
        progress: called with one line at the start of each stage.

    Raises:
        ExportError: the checkpoint cannot be exported, or the result deviates too far from PyTorch. `out` is unchanged.
        CheckpointError: the checkpoint is missing or incomplete.
        DataError: `calibration` is not a catalog.
        OptionError: an option has an unknown value or no effect, or the key cannot be used.
    """
    check_options(precision, target)
    options = BaseOptions.of(
        variant=variant, lora=lora, textual_inversion=textual_inversion, vae=vae, base_config=base_config
    )
    switchable: tuple[Lora, ...] = ()
    if lora_switchable:
        check_switchable(precision, target)
        check_names(options.loras)
        switchable = options.loras
        options = replace(options, loras=())
    start, out, report = time.perf_counter(), checked_path(out, ExportError).absolute(), progress or (lambda line: None)
    tolerance = tolerance or TOLERANCES[precision]
    key = None if sign is None else read_private_key(sign)  # fails before the export, not after it

    with _disk_errors(out), new_folder(out, overwrite=overwrite) as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for random inputs of tracing and comparing
        report("Loading the checkpoint")
        if checkpoint is None and switchable:
            raise OptionError("LoRA files belong to a Stable Diffusion. Name one, or leave them out.")
        prepare = _export_search_model if checkpoint is None else partial(_export_checkpoint, checkpoint, switchable)
        exported = prepare(clip, options, calibration, columns, precision, report)
        bundle = _UnfinishedBundle(folder, out.name, exported, precision, target, report)
        bundle.write(fork)
        evidence = _verify(bundle, tolerance, report)
        if TARGETS[target].channels_last:
            evidence = _finish_for_gpu(bundle, evidence, report)

        seconds, peak = time.perf_counter() - start, peak_bytes()
        rerank = None
        if calibration is not None and checkpoint is not None:
            rerank = _choose_rerank(bundle.open(), calibration, report)
        bundle.finish(evidence, {"seconds": round(seconds, 1), "peak_mib": peak >> 20}, rerank)
        if key is not None:
            sign_manifest(folder, key)
    return Export(
        path=out,
        graphs=_reports(bundle.writer, evidence),
        image=evidence.image,
        search=evidence.search,
        embeddings=evidence.embeddings,
        seconds=seconds,
        bytes=folder_size(out),
        peak_bytes=peak,
    )


# --- stages ----------------------------------------------------------------------------------------------------------


def _load(checkpoint: str | Path | Checkpoint, clip: str | Path | None, options: BaseOptions) -> Checkpoint:
    """Load a checkpoint, or a Stable Diffusion pipeline with its CLIP."""
    if not isinstance(checkpoint, Checkpoint):
        return load_base(checkpoint, clip, options)
    if options != BaseOptions():
        raise OptionError(
            "The checkpoint is already loaded, so nothing can be added to it. Name its folder, or pass the options to "
            "load_base."
        )
    return checkpoint


def warn_of_replacement(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint, with a warning if the bundle's default sampler is another than its scheduler."""
    if replaces := checkpoint.replaced_scheduler:
        warn(replacement_notice(checkpoint.path, checkpoint.sampler_defaults["name"], replaces))
    return checkpoint


def _export_checkpoint(
    checkpoint: str | Path | Checkpoint,
    switchable: Sequence[Lora],
    clip: str | Path | None,
    options: BaseOptions,
    calibration: str | Path | None,
    columns: Mapping[str, str | None] | None,
    precision: str,
    report: Progress,
) -> Exported:
    """Load a checkpoint with a generator, and compute what it is compared with."""
    loaded = warn_of_replacement(_load(checkpoint, clip, options))
    specs, from_disk = graph_specs(loaded), loaded is not checkpoint
    read = partial(read_samples, loaded, calibration, columns=columns)
    reference, policy = _prepare(loaded, specs, precision, read, report, from_disk)
    loras = read_loras(loaded, switchable, reference, from_disk)
    specs = with_optional_inputs(specs, loras)
    return Exported(
        specs=specs,
        configs=graph_configs(loaded),
        description=describe_model(loaded),
        reference=reference,
        policy=policy,
        write_files=partial(write_pipeline_files, loaded),
        write_card=lambda folder, manifest: write_model_card(folder, manifest, loaded.meta, loaded.path),
        loras=loras,
        modules=loaded.modules() if from_disk else (),
    )


def _export_search_model(
    clip: str | Path | None,
    options: BaseOptions,
    calibration: str | Path | None,
    columns: Mapping[str, str | None] | None,
    precision: str,
    report: Progress,
) -> Exported:
    """Load encoders without a generator, and compute what they are compared with."""
    if clip is None:
        raise OptionError("Name a checkpoint to export, or a CLIP with --clip for a bundle that only searches.")
    if replace(options, variant=None) != BaseOptions():
        raise OptionError(
            "LoRA files, tokens, a VAE and a configuration belong to a Stable Diffusion. Name one, or leave them out."
        )
    return export_search_model(load_search_model(clip, options.variant), calibration, columns, precision, report)


def _prepare(
    checkpoint: Checkpoint,
    specs: Sequence[GraphSpec],
    precision: str,
    read: Callable[..., Samples],
    report: Progress,
    from_disk: bool,
) -> tuple[Reference, Int8Policy | None]:
    """Compute the reference of PyTorch; for int8, calibrate on other captions than those of the reference.

    `read` is `read_samples` of the data.
    """
    workload = workload_for(checkpoint, precision)
    if precision != "int8":
        samples, calibration_samples = read(workload.pairs), None
    else:
        all_samples = read(workload.pairs, default=())
        samples, calibration_samples = all_samples.split(workload.calibration_images)
        if not calibration_samples.captions:
            raise ExportError(
                f"{checkpoint.path} records fewer than 2 captions, but int8 needs captions to calibrate on. Pass "
                "--calibration DATA, a folder of your images with captions."
            )
    report("Generating reference images with diffusers")
    reference = make_reference(checkpoint, specs, samples, workload, sampler_defaults(checkpoint), from_disk)
    if calibration_samples is None:
        return reference, None
    report("Calibrating int8")
    return reference, _calibrate(checkpoint, specs, calibration_samples, reference)


def _calibrate(
    checkpoint: Checkpoint, specs: Sequence[GraphSpec], samples: Samples, reference: Reference
) -> Int8Policy:
    generate = partial(
        generate_images,
        load_pipeline(checkpoint, reference.sampler),
        side=checkpoint.unet.config.sample_size,
        seed=1,
        steps=reference.steps,
        guidance_scale=reference.guidance_scale,
    )
    return Int8Policy(specs, calibrate(checkpoint, specs, samples, generate))


class _UnfinishedBundle:
    """The bundle in its temporary folder. The runtime can open it after `write_manifest`."""

    def __init__(
        self, folder: Path, name: str, exported: Exported, precision: str, target: str, report: Progress
    ) -> None:
        self.exported, self.precision = exported, precision
        self._folder, self._name, self._target = folder, name, target
        self._manifest: Manifest | None = None
        self._loras: dict[str, SwitchableLora] = {}
        self.writer = GraphWriter(
            folder, exported.configs, precision, target, exported.policy, exported.reference, report
        )

    def write(self, fork: bool) -> None:
        """Write the graphs and all other files but the manifest and the model card. `fork`: see `export_bundle`."""
        self.writer.write_all(self.exported.specs, fork)
        self.exported.write_files(self._folder)
        self._loras = write_loras(self._folder, self.exported.specs, self.exported.loras)

    def write_manifest(self) -> None:
        """Write the manifest of the current files, without evidence."""
        self._manifest = build_manifest(
            replace(self.exported.description, loras=self._loras),
            self._folder,
            name=self._name,
            graphs=self.writer.graphs,
            precision=self.precision,
            target=self._target,
        )
        write_manifest(self._folder, self._manifest)

    def open(self, **options: Any) -> Bundle:
        """Open the bundle without verifying the hashes that `write_manifest` has just computed."""
        return Bundle.open(self._folder, verify=False, **options)

    def finish(self, evidence: Evidence, cost: Mapping[str, Any], rerank: RerankDefaults | None) -> None:
        """Add the evidence, time and memory of the export, and defaults to the manifest; write the model card."""
        assert self._manifest is not None  # nothing is verified without a manifest
        loras = {name: replace(lora, psnr_db=evidence.loras[name]) for name, lora in self._loras.items()}
        manifest = replace(self._manifest, parity=evidence.to_json(), export=cost, rerank=rerank, loras=loras)
        write_manifest(self._folder, manifest)
        self.exported.write_card(self._folder, manifest)


def _verify(bundle: _UnfinishedBundle, tolerance: Tolerance, report: Progress) -> Evidence:
    """Compare the bundle with PyTorch; for int8, keep more layers in float until the comparison passes."""
    exported, parity = bundle.exported, dict[str, GraphParity]()
    while True:
        bundle.write_manifest()
        try:
            opened = _compare_graphs(bundle, tolerance, parity, report)
            results = _compare_results(opened, exported.reference, tolerance, report)
            return Evidence(parity, *results, loras=_compare_loras(opened, exported, tolerance, report))
        except ToleranceError as failure:
            changed = exported.policy.keep_more_float(failure.graphs) if exported.policy else []
            if not changed:
                raise
            for spec in exported.specs:
                if spec.name in changed:
                    parity.pop(spec.name, None)
                    bundle.writer.write(spec)


def _compare_graphs(
    bundle: _UnfinishedBundle, tolerance: Tolerance, parity: dict[str, GraphParity], report: Progress
) -> Bundle:
    """Compare the graphs that are missing in `parity` with PyTorch, and add them to it.

    The weights in PyTorch are released before the first graph is loaded, unless graphs may be written again.

    Returns the opened bundle. Its denoiser, the slowest graph to load, stays loaded for generation.
    """
    exported, written = bundle.exported, bundle.writer.graphs
    specs = [spec for spec in exported.specs if spec.name not in parity]
    specs.sort(key=lambda spec: spec.denoises)
    report("Computing the outputs of PyTorch")
    expected = {
        spec.name: expected_outputs(spec, calls_for(spec, written[spec.name].precision, exported.reference))
        for spec in specs
    }
    if exported.policy is None:
        exported.release_weights()
    whole = bundle.open(threads=torch.get_num_threads())
    for spec in specs:
        report(f"Comparing {spec.name} with PyTorch")
        precision = written[spec.name].precision
        # Other graphs than the denoiser are opened in separate bundles, which release their memory before the next.
        opened = whole if spec.denoises else bundle.open(threads=torch.get_num_threads())
        limits = tolerance if precision == bundle.precision else TOLERANCES[precision]
        parity[spec.name] = compare_graph(opened.session(spec.name), spec, limits, expected[spec.name])
    return whole


def _compare_results(
    bundle: Bundle, reference: SearchReference, tolerance: Tolerance, report: Progress
) -> tuple[ImageParity | None, SearchParity | None, EmbeddingParity]:
    """Compare whole images with diffusers, then search and the embeddings of unusual inputs with transformers."""
    encoder, image = Encoder(bundle), None
    if isinstance(reference, Reference):
        report("Comparing images with diffusers")
        image = compare_images(Generator(bundle).generate, encoder, reference, tolerance)
    report("Comparing search with PyTorch")
    search = compare_search(encoder, reference, tolerance)
    return image, search, compare_embeddings(encoder, reference, tolerance)


def _compare_loras(bundle: Bundle, exported: Exported, tolerance: Tolerance, report: Progress) -> dict[str, float]:
    """Compare the images with each switchable LoRA with diffusers."""
    if not (exported.loras and isinstance(exported.reference, Reference)):
        return {}
    report("Comparing images with the LoRAs with diffusers")
    return compare_loras(Generator(bundle).generate, exported.loras, exported.reference, tolerance)


def _finish_for_gpu(bundle: _UnfinishedBundle, evidence: Evidence, report: Progress) -> Evidence:
    """Rewrite the graphs for kernels that only a GPU has, and compare them on a GPU if this machine has one.

    The tolerance is that of half precision, because a GPU rounds float32 products to TF32, which has as many digits.
    """
    bundle.writer.rewrite_for_gpu()
    bundle.write_manifest()
    on_gpu = bundle.open(device="cuda")
    try:
        on_gpu.session(on_gpu.manifest.denoiser.graph if on_gpu.generates else "image_encoder")
    except ProviderError:
        report("Skipping the comparison on a GPU: ONNX Runtime finds none")
        return evidence
    report("Comparing on the GPU")
    results = _compare_results(on_gpu, bundle.exported.reference, TOLERANCES["fp16"], report)
    return replace(evidence, devices={"cuda": results_to_json(*results)})


def _choose_rerank(bundle: Bundle, calibration: str | Path, report: Progress) -> RerankDefaults | None:
    """Choose the defaults of `search(rerank=)`. None without a CPU, time or captions to measure on."""
    if "cpu" not in (bundle.manifest.devices or ("cpu",)):
        report("Skipping the defaults of rerank=: the bundle does not run on a CPU")
        return None
    affordable = affordable_queries(bundle)
    if affordable < MIN_QUERIES:
        report(f"Skipping the defaults of rerank=: time for {affordable} captions only. Run: unidiff-export rerank")
        return None
    report("Choosing the defaults of rerank=")
    try:
        return rerank_defaults(bundle, [calibration], min(affordable, MAX_QUERIES))
    except DataError as error:
        report(f"Skipping the defaults of rerank=: {error}")
        return None


def _reports(writer: GraphWriter, evidence: Evidence) -> tuple[GraphReport, ...]:
    return tuple(
        GraphReport(
            name=name,
            precision=graph.precision,
            attention_nodes=graph.attention_nodes or 0,
            bytes=graph.bytes or 0,
            parity=evidence.graphs[name],
            int8=graph.int8,
        )
        for name, graph in writer.graphs.items()
    )


# --- resources -------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """Return the peak memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    """Convert errors of the file system (disk full, read-only, no permission) to an ExportError."""
    try:
        yield
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror or error}. No partial bundle was left.") from error
