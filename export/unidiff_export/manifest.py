"""manifest.json: what a bundle says of itself, for the runtime to check and to run by."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from unidiff_sdk.inference.bundle import FORMAT, MANIFEST, SCHEMA_VERSION, fingerprint_of, manifest_checksum
from unidiff_sdk.inference.diffusers_folder import DEFAULT_SAMPLER
from unidiff_sdk.inference.shape_profiles import shape_profile

from .bundle_folder import GRAPH_FILE, hash_files, write_json
from .graphs.attention import count_attention
from .graphs.lowering import GraphSpec
from .options import TARGETS

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint


def describe_graph(model: ir.Model, spec: GraphSpec, precision: str, target: str) -> dict[str, Any]:
    """A graph's entry: its file, its interface, the precision that it computes in, its attention nodes."""
    return {
        "file": f"{spec.name}/{GRAPH_FILE}",
        "precision": precision,
        "inputs": {str(value.name): _interface(value) for value in model.graph.inputs},
        "outputs": {str(value.name): _interface(value) for value in model.graph.outputs},
        "attention_nodes": count_attention(model, TARGETS[target]),
    }


def _interface(value: ir.Value) -> dict[str, Any]:
    """dtype in numpy's words; shape with a number for each fixed axis and a name for each dynamic one."""
    assert value.dtype is not None and value.shape is not None  # the exporter types every input and output
    shape = [axis if isinstance(axis, int) else str(axis.value) for axis in value.shape]
    return {"dtype": value.dtype.numpy().name, "shape": shape}


def build_manifest(
    facts: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    graphs: Mapping[str, Mapping[str, Any]],
    precision: str,
    target: str,
) -> dict[str, Any]:
    """The manifest of the finished files in `folder`, still without its parity report. `facts`: see `model_facts`."""
    from unidiff_sdk import __version__

    files = hash_files(folder)
    devices = TARGETS[target].devices
    if precision == "int8":
        devices = ("cpu",)  # without kernels for 8 bits, a GPU would hand most layers over, or compute in float32
    if any(entry.get("channels_last") for entry in graphs.values()):
        devices = ("cuda",)
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "sdk_version": __version__,
        "precision": precision,
        "target": target,
        "opset": TARGETS[target].opset,
        "devices": devices,
        "graphs": {
            graph: {**entry, "profile": shape_profile(graph, entry["inputs"], facts)} for graph, entry in graphs.items()
        },
        **facts,
        "files": files,
        "parity": {},
        "fingerprint": fingerprint_of(files),
    }


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the runtime must know of the models: sizes, scales, normalization, sampler defaults."""
    clip, vae, unet, processor = checkpoint.clip, checkpoint.vae, checkpoint.unet, checkpoint.image_processor
    return {
        "embedding": {
            "dim": clip.config.projection_dim,
            "shared_text_encoder": checkpoint.shared,
            "conditioning_layer": checkpoint.conditioning_layer,
            "max_tokens": clip.config.text_config.max_position_embeddings,
            "logit_scale": clip.logit_scale.exp().item(),
        },
        "prompt": {"max_tokens": checkpoint.text_encoder.config.max_position_embeddings},
        "image": {
            "size": clip.config.vision_config.image_size,
            "mean": list(processor.image_mean),
            "std": list(processor.image_std),
            "fit": checkpoint.fit,
        },
        "latent": {
            "channels": unet.config.in_channels,
            "size": unet.config.sample_size,
            "scale_factor": checkpoint.latent_factor,
            "scaling_factor": vae.config.scaling_factor,
            "shift_factor": vae.config.shift_factor or 0.0,
        },
        "sampler": sampler_defaults(checkpoint) | {"prediction_type": checkpoint.scheduler.config.prediction_type},
        "synthetic": bool(checkpoint.meta.get("synthetic", False)),
    }


def sampler_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """name, steps and guidance_scale: those that the checkpoint was made for."""
    return DEFAULT_SAMPLER | checkpoint.meta.get("sampler", {})


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` with a checksum of its own, so that a change to it is found like one to any other file."""
    write_json(folder / MANIFEST, {**manifest, "checksum": manifest_checksum(manifest)})
