"""Write the graphs of a bundle: lower each module, convert its precision, save it and describe it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from unidiff_export.graphs.lowering import GraphSpec, lower
from unidiff_export.graphs.passes import rewrite_for_cuda
from unidiff_export.graphs.precision import overflows_half, store_halves
from unidiff_export.options import CONTRIB, TARGETS
from unidiff_export.quantization.policy import Int8Policy
from unidiff_export.quantization.qdq import quantize
from unidiff_export.reference import SearchReference
from unidiff_sdk.inference.manifest import Graph
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
from unidiff_sdk.training.runtime.allocator import return_freed_memory

from .files import graph_files, plain_config, rewrite_graph, write_graph
from .forking import forked
from .manifest import describe_graph


class GraphWriter:
    """Writes graphs into a bundle folder.

    Args:
        folder: the bundle folder.
        configs: the configuration of each graph's model, for its config.json.
        precision, target: see `export_bundle`.
        policy: the layers to quantize; None for fp32 and fp16.
        reference: its calls show which graphs overflow half precision.
        progress: receives one line per graph.

    Attributes:
        graphs: the manifest's entries of the written graphs.
    """

    def __init__(
        self,
        folder: Path,
        configs: Mapping[str, Any],
        precision: str,
        target: str,
        policy: Int8Policy | None,
        reference: SearchReference,
        progress: Callable[[str], None],
    ) -> None:
        self.graphs: dict[str, Graph] = {}
        self._folder, self._configs, self._progress = folder, configs, progress
        self._precision, self._target, self._policy, self._reference = precision, target, policy, reference
        self._lowered: dict[str, ir.Model] = {}  # int8 only: the float graphs, which may be quantized several times

    def write_all(self, specs: Sequence[GraphSpec], fork: bool = False) -> None:
        """Write all graphs. `fork`: see `export_bundle`; lowering a graph uses one core only."""
        denoisers = [spec for spec in specs if spec.denoises]
        others = [spec for spec in specs if not spec.denoises]
        can_fork = sys.platform == "linux" and torch.get_num_threads() > 1  # on macOS, system libraries forbid it
        if not (fork and can_fork and denoisers and self._precision == "fp32"):
            self._write_each(specs)
            return
        with forked(partial(self._write_in_fork, denoisers)) as result:  # its memory, which is most, ends with it
            self._write_each(others)
            self._progress(f"Lowering {denoisers[0].name}")
            written = self.graphs | result()
        self.graphs = {spec.name: written[spec.name] for spec in specs}

    def _write_in_fork(self, specs: Sequence[GraphSpec]) -> dict[str, Graph]:
        self._progress = lambda line: None  # a thread that shows progress may have held locks, and does not exist here
        return self._write_each(specs)

    def _write_each(self, specs: Sequence[GraphSpec]) -> dict[str, Graph]:
        for spec in specs:
            self.write(spec)
        return self.graphs

    def write(self, spec: GraphSpec) -> None:
        """Lower a graph to the bundle's precision, and write its folder and its entry. It replaces an earlier one."""
        model, precision, quantized = self._convert(spec)
        folder = self._folder / spec.name
        write_graph(model, folder, plain_config(self._configs[spec.name]))
        self.graphs[spec.name] = replace(
            describe_graph(model, spec, precision, self._target),
            bytes=_graph_bytes(folder),
            int8=self._policy.describe(spec.name, quantized) if self._policy else None,
        )
        del model
        return_freed_memory()  # graphs contain reference cycles, and each holds a copy of some weights

    def rewrite_for_gpu(self) -> None:
        """Rewrite the written graphs for CUDA's channels-last kernels, and update their entries."""
        for name, graph in self.graphs.items():
            folder = self._folder / name
            if rewrite_graph(folder, rewrite_for_cuda):
                self.graphs[name] = replace(graph, channels_last=True, bytes=_graph_bytes(folder))

    def _convert(self, spec: GraphSpec) -> tuple[ir.Model, str, list[str]]:
        """Return the graph, its precision, and its quantized layers.

        A graph is fp32 if half precision would overflow, or if no layer can be quantized.
        """
        target = TARGETS[self._target]
        if self._precision == "fp16" and not self._stays_float(spec):
            calls = [spec.example(1, 1), *self._reference.observed_calls(spec.name)]
            if not any(overflows_half(spec.module, inputs) for inputs in calls):
                self._progress(f"Lowering {spec.name}")
                return lower(spec, target, half=True), "fp16", []
        model = self._float_graph(spec)
        quantized: list[str] = []
        if self._policy:
            ranges, float_layers = self._policy.ranges(spec.name), len(self._policy.float_layers(spec.name))
            self._progress(f"Quantizing {spec.name}" + (f", {float_layers} layers in float" if float_layers else ""))
            quantized = quantize(model, ranges, contrib=CONTRIB in target.domains)
        store_halves(model)
        return model, "int8" if quantized else "fp32", quantized

    def _stays_float(self, spec: GraphSpec) -> bool:
        """Whether the configuration states that half precision overflows. The samples may not show it.

        diffusers' pipelines read `force_upcast` of the VAE for Stable Diffusion XL only.
        """
        is_vae = spec.name in ("vae_decoder", "vae_encoder")
        return (
            is_vae
            and {"text_encoder_2", "unet"} <= self._configs.keys()
            and bool(self._configs[spec.name].config.force_upcast)
        )

    def _float_graph(self, spec: GraphSpec) -> ir.Model:
        """Return the graph in float32; for int8, a copy of the one that is lowered once."""
        if spec.name in self._lowered:
            return self._lowered[spec.name].clone()
        self._progress(f"Lowering {spec.name}")
        model = lower(spec, TARGETS[self._target])
        if self._policy:
            self._lowered[spec.name] = model
            return model.clone()
        return model


def _graph_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in graph_files(folder))


def graph_configs(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the configuration of the model behind each graph."""
    configs = {
        "text_encoder": checkpoint.text_encoder.config,
        "clip_text_encoder": checkpoint.clip.config.text_config,
        checkpoint.denoiser: checkpoint.unet,
        "vae_decoder": checkpoint.vae,
        "vae_encoder": checkpoint.vae,
        "image_encoder": checkpoint.clip.config.vision_config,
    }
    if checkpoint.second is not None:
        configs["text_encoder_2"] = checkpoint.second.model.config
    if checkpoint.third is not None:
        configs["text_encoder_3"] = checkpoint.third.model.config
    return configs
