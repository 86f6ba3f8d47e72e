"""Build the manifest of an exported bundle and write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from unidiff_export.graphs.attention import count_attention
from unidiff_export.graphs.lowering import GraphSpec
from unidiff_export.graphs.text_encoders import HiddenStates
from unidiff_export.options import TARGETS
from unidiff_sdk.inference.manifest import (
    GRAPH_FILE,
    MANIFEST,
    Conditioning,
    Embedding,
    Graph,
    ImageInput,
    JointConditioning,
    Latent,
    Manifest,
    ModelDescription,
    Prompt,
    SamplerDefaults,
    TensorSpec,
    fingerprint_of,
    to_json,
)
from unidiff_sdk.inference.shape_profiles import shape_profile
from unidiff_sdk.training.checkpoints.loading.second_text_encoder import THIRD_TOKENS
from unidiff_sdk.training.checkpoints.text_sharing import tower_of

from .files import hash_files, write_json

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
    from unidiff_sdk.training.checkpoints.loading.second_text_encoder import SecondTextEncoder


def describe_graph(model: ir.Model, spec: GraphSpec, precision: str, target: str) -> Graph:
    """A graph's file, its interface, the precision that it computes in, and its attention nodes."""
    return Graph(
        file=f"{spec.name}/{GRAPH_FILE}",
        precision=precision,
        # Inputs with a default are those of switchable LoRAs.
        inputs={str(v.name): _tensor(v) for v in model.graph.inputs if str(v.name) not in model.graph.initializers},
        outputs={str(value.name): _tensor(value) for value in model.graph.outputs},
        attention_nodes=count_attention(model, TARGETS[target]),
    )


def _tensor(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None and value.shape is not None  # the exporter types every input and output
    shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
    return TensorSpec(value.dtype.numpy().name, shape)


def build_manifest(
    model: ModelDescription, folder: Path, *, name: str, graphs: Mapping[str, Graph], precision: str, target: str
) -> Manifest:
    """The manifest of the finished files in `folder`, still without its parity report."""
    from unidiff_sdk import __version__

    files = hash_files(folder)
    devices = TARGETS[target].devices
    if precision == "int8":
        devices = ("cpu",)  # without 8-bit kernels, a GPU falls back to the CPU or computes in float32
    if any(graph.channels_last for graph in graphs.values()):
        devices = ("cuda",)
    return Manifest(
        **vars(model),
        name=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        sdk_version=__version__,
        precision=precision,
        target=target,
        opset=TARGETS[target].opset,
        devices=devices,
        graphs={key: replace(graph, profile=shape_profile(key, graph.inputs, model)) for key, graph in graphs.items()},
        files=files,
        parity={},
        fingerprint=fingerprint_of(files),
    )


def describe_model(checkpoint: Checkpoint) -> ModelDescription:
    """What the runtime needs of the models: sizes, scales, normalization, sampler defaults."""
    clip, vae, unet = checkpoint.clip, checkpoint.vae, checkpoint.unet
    mean, std = checkpoint.normalization
    return ModelDescription(
        embedding=Embedding(
            dim=clip.config.projection_dim,
            shared_text_encoder=checkpoint.shared,
            conditioning_layer=checkpoint.conditioning_layer,
            max_tokens=clip.config.text_config.max_position_embeddings,
            logit_scale=clip.logit_scale.exp().item(),
        ),
        prompt=Prompt(checkpoint.text_encoder.config.max_position_embeddings),
        conditioning=describe_conditioning(checkpoint),
        joint_conditioning=describe_joint_conditioning(checkpoint),
        image=ImageInput(
            size=clip.config.vision_config.image_size,
            mean=mean,
            std=std,
            fit=checkpoint.fit,
        ),
        latent=Latent(
            channels=unet.config.in_channels,
            size=unet.config.sample_size,
            scale_factor=checkpoint.latent_factor,
            scaling_factor=vae.config.scaling_factor,
            shift_factor=checkpoint.latent_shift,
        ),
        sampler=SamplerDefaults(
            **sampler_defaults(checkpoint),
            prediction_type=checkpoint.prediction_type,
            replaces=checkpoint.replaced_scheduler,
        ),
        synthetic=bool(checkpoint.meta.get("synthetic", False)),
    )


def describe_conditioning(checkpoint: Checkpoint) -> Conditioning | None:
    """What conditions the UNet of Stable Diffusion XL. None for other models."""
    if checkpoint.second is None or checkpoint.is_transformer:
        return None
    states = _conditioning_states(checkpoint, checkpoint.second)
    return Conditioning(states, checkpoint.second.pooled_width, checkpoint.second.zero_negative)


def describe_joint_conditioning(checkpoint: Checkpoint) -> JointConditioning | None:
    """What conditions the transformer of Stable Diffusion 3. None for other models."""
    if checkpoint.second is None or not checkpoint.is_transformer:
        return None
    return JointConditioning(
        states=_conditioning_states(checkpoint, checkpoint.second),
        width=checkpoint.unet.config.joint_attention_dim,
        third_tokens=THIRD_TOKENS,
        pooled_width=checkpoint.unet.config.pooled_projection_dim,
    )


def _conditioning_states(checkpoint: Checkpoint, second: SecondTextEncoder) -> tuple[str, str]:
    """The outputs of the two text encoders that condition the denoiser."""
    first, other = tower_of(checkpoint.text_encoder), tower_of(second.model)
    return HiddenStates(first).conditioning, HiddenStates(other).conditioning


def model_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """`describe_model` as the values of manifest.json."""
    facts: dict[str, Any] = to_json(describe_model(checkpoint))
    facts["embedding"].setdefault("conditioning_layer", None)
    return facts


def sampler_defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """name, steps and guidance_scale: those that the checkpoint was made for."""
    return checkpoint.sampler_defaults


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json. Its checksum reveals later changes."""
    write_json(folder / MANIFEST, manifest.to_json())
