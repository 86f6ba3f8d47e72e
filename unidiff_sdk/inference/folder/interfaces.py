"""Whether the graphs of a bundle have the inputs and outputs that its manifest states and that the runtime calls.

It is checked when a bundle is opened, from the files alone. Otherwise a graph of another model would fail at its first
call, or would return embeddings of another space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.manifest import TIME_IDS, Graph, Manifest, TensorSpec

from .files import BundleFiles
from .onnx_file import OnnxFile, read_onnx_file

__all__ = ["check_interfaces", "read_graph"]

# Only plain names: ONNX Runtime also accepts paths and addresses in memory ("*/_ORT_MEM_ADDR_/*").
EXTERNAL_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# A node that loads an engine from a file of its own choice.
REFUSED_OPERATORS = {"EPContext"}

ANY = "?"
"""An axis of any size, fixed or not."""
BATCH = "batch"
"""An axis that the graph may not fix."""


def read_graph(files: BundleFiles, graph: Graph) -> tuple[OnnxFile, list[str]]:
    """Read the file of a graph.

    Returns:
        what the file states, and the paths of its external weights in the bundle.

    Raises:
        BundleError: it is not an ONNX graph, uses a refused operator, or names a file that is not in the bundle.
    """
    path = files.path(graph.file)
    found = read_onnx_file(path)
    if refused := REFUSED_OPERATORS & found.operators:
        raise BundleError(f"{path}: the operator {', '.join(refused)} is not allowed; export the bundle again")
    for name in found.external_files:
        if not EXTERNAL_NAME.fullmatch(name):
            raise BundleError(
                f"{path}: its weights are in {name!r:.200}, which is not the name of a file next to it; export the "
                "bundle again"
            )
    external = [PurePosixPath(graph.file).with_name(name).as_posix() for name in sorted(found.external_files)]
    for name in external:
        files.path(name)
    return found, external


def check_interfaces(found: Mapping[str, OnnxFile], manifest: Manifest, files: BundleFiles, *, derived: bool) -> None:
    """Compare what the files of the graphs state with the manifest.

    Args:
        found: what each file states, by the name of its graph.
        manifest: states the inputs and outputs, and the sizes of the model.
        files: names the folder in messages.
        derived: the graphs are those of another exporter, whose data types and timesteps `AdaptedSession` converts.

    Raises:
        BundleError: names, shapes or data types differ.
    """
    for name, onnx_file in found.items():
        graph, where = manifest.graphs[name], f"{files.folder / manifest.graphs[name].file}: the graph {name}"
        for kind, tensors, stated, called in (
            ("input", onnx_file.inputs, graph.inputs, _inputs(name, manifest)),
            ("output", onnx_file.outputs, graph.outputs, _outputs(name, manifest)),
        ):
            if derived:
                tensors, called = _adapted(tensors, called)
            elif stated:
                _compare_names(tensors, stated, kind, where, "the manifest states")
                for key, tensor in stated.items():
                    if not _is_stated(tensors[key], tensor):
                        raise _differs(where, kind, key, tensors[key], f"the manifest states {_text(tensor)}")
            if called:
                _compare_names(tensors, called, kind, where, "the runtime uses", extra=kind == "output")
            for key, tensor in called.items():
                if not _fits(tensors[key], tensor, derived):
                    raise _differs(where, kind, key, tensors[key], f"the model has {_text(tensor)}")
    _check_width(found, manifest, files)


def _compare_names(
    found: Mapping[str, TensorSpec | None],
    expected: Mapping[str, TensorSpec],
    kind: str,
    where: str,
    source: str,
    *,
    extra: bool = False,
) -> None:
    if expected.keys() == found.keys() or (extra and expected.keys() <= found.keys()):
        return
    raise BundleError(
        f"{where} has the {kind}s {', '.join(sorted(found)):.200}, but {source} {', '.join(sorted(expected)):.200}; "
        "export the bundle again"
    )


def _differs(where: str, kind: str, name: str, found: TensorSpec | None, expected: str) -> BundleError:
    return BundleError(f"{where} has the {kind} {name} {_text(found)}, but {expected}; export the bundle again")


def _check_width(found: Mapping[str, OnnxFile], manifest: Manifest, files: BundleFiles) -> None:
    """The denoiser takes token states of the width that the text encoders return together.

    That of Stable Diffusion 3 takes wider ones, padded with zeros.
    """
    denoiser, states = manifest.denoiser.graph, manifest.text_states
    if not found.keys() >= {denoiser, *states}:
        return
    taken = found[denoiser].inputs.get("encoder_hidden_states")
    widths = [tensor.shape[-1] for graph, name in states.items() if (tensor := found[graph].outputs.get(name))]
    fixed = [width for width in widths if isinstance(width, int)]
    joint = manifest.joint_conditioning
    fits = taken is None or (sum(fixed) <= joint.width if joint else _same_axis(sum(fixed), taken.shape[-1]))
    if taken and widths and len(fixed) == len(widths) and not fits:
        returning = "text encoder returns" if len(fixed) == 1 else "text encoders return"
        kind = "UNet" if joint is None else "transformer"
        raise BundleError(
            f"{files.folder}: the {kind} takes token states of width {taken.shape[-1]}, but the {returning} "
            f"{' and '.join(map(str, fixed))}: they belong to different models; export the bundle again"
        )


def _inputs(graph: str, manifest: Manifest) -> dict[str, TensorSpec]:
    """The inputs that the runtime gives to a graph. Empty for an unknown graph."""
    embedding, image, latents = manifest.embedding, manifest.image, _latents(manifest)
    added, joint = manifest.conditioning, manifest.joint_conditioning
    match graph:
        case "text_encoder" | "text_encoder_2":
            return {"input_ids": TensorSpec("int64", (BATCH, manifest.prompt_tokens))}
        case "text_encoder_3" if joint:
            return {"input_ids": TensorSpec("int64", (BATCH, joint.third_tokens))}
        case "clip_text_encoder" if embedding:
            return {"input_ids": TensorSpec("int64", (BATCH, embedding.max_tokens))}
        case "image_encoder" if image and image.patches:
            count, width = image.patches.count, image.patches.width
            return {
                "pixel_values": TensorSpec("float32", (BATCH, count, width)),
                "pixel_attention_mask": TensorSpec("int32", (BATCH, count)),
                "spatial_shapes": TensorSpec("int64", (BATCH, 2)),
            }
        case "image_encoder" if image:
            return {"pixel_values": TensorSpec("float32", (BATCH, 3, image.size, image.size))}
        case "unet":
            inputs = {
                "sample": latents,
                "timestep": TensorSpec("float32", (BATCH,)),
                "encoder_hidden_states": TensorSpec("float32", (BATCH, manifest.prompt_tokens, ANY)),
            }
            if added is None:
                return inputs
            return inputs | {
                "text_embeds": TensorSpec("float32", (BATCH, added.pooled_width)),
                "time_ids": TensorSpec("float32", (BATCH, TIME_IDS)),
            }
        case "transformer" if joint:
            return {
                "hidden_states": latents,
                "timestep": TensorSpec("float32", (BATCH,)),
                "encoder_hidden_states": TensorSpec("float32", (BATCH, manifest.state_tokens, joint.width)),
                "pooled_projections": TensorSpec("float32", (BATCH, joint.pooled_width)),
            }
        case "vae_decoder":
            return {"latent_sample": latents}
        case "vae_encoder":
            return {"sample": _pixels(manifest)}
    return {}


def _outputs(graph: str, manifest: Manifest) -> dict[str, TensorSpec]:
    """The outputs of a graph that the runtime uses. Empty for an unknown graph."""
    latents, states, joint = _latents(manifest), manifest.text_states, manifest.joint_conditioning
    pooled = TensorSpec("float32", (BATCH, manifest.conditioning.pooled_width if manifest.conditioning else ANY))
    embeds = TensorSpec("float32", (BATCH, manifest.embedding.dim if manifest.embedding else ANY))
    match graph:
        case "text_encoder":
            if manifest.latent is None:  # of a bundle that only searches
                return {"text_embeds": embeds}
            conditioning = {states[graph]: TensorSpec("float32", (BATCH, manifest.prompt_tokens, ANY))}
            if manifest.embedding is None or "clip_text_encoder" in manifest.graphs:
                return conditioning | ({"text_embeds": pooled} if joint else {})
            return conditioning | {"text_embeds": embeds}
        case "text_encoder_2" if graph in states:
            return {
                states[graph]: TensorSpec("float32", (BATCH, manifest.prompt_tokens, ANY)),
                "text_embeds": pooled,
            }
        case "text_encoder_3" if joint:
            return {"last_hidden_state": TensorSpec("float32", (BATCH, joint.third_tokens, joint.width))}
        case "clip_text_encoder":
            return {"text_embeds": embeds}
        case "image_encoder":
            return {"image_embeds": embeds}
        case "unet":
            return {"out_sample": latents}
        case "transformer":
            return {"out_hidden_states": latents}
        case "vae_decoder":
            return {"sample": _pixels(manifest)}
        case "vae_encoder":
            return {"latent_sample": latents}
    return {}


def _latents(manifest: Manifest) -> TensorSpec:
    latent = manifest.latent
    sizes: tuple[int | str, ...] = (latent.channels, latent.size, latent.size) if latent else (ANY, ANY, ANY)
    return TensorSpec("float32", (BATCH, *sizes))


def _pixels(manifest: Manifest) -> TensorSpec:
    latent = manifest.latent
    side = latent.size * latent.scale_factor if latent else ANY
    return TensorSpec("float32", (BATCH, 3, side, side))


def _adapted(
    found: Mapping[str, TensorSpec | None], called: Mapping[str, TensorSpec]
) -> tuple[dict[str, TensorSpec | None], dict[str, TensorSpec]]:
    """The tensors of another exporter, as `AdaptedSession` calls them."""
    tensors, wanted = dict(found), dict(called)
    if "latent_parameters" in tensors and "latent_sample" in wanted:  # mean and variance in twice the channels
        latents = wanted["latent_sample"]
        tensors["latent_sample"] = tensors.pop("latent_parameters")
        wanted["latent_sample"] = TensorSpec(latents.dtype, (BATCH, ANY, *latents.shape[2:]))
    if (timestep := tensors.get("timestep")) and not timestep.shape:  # one for all samples
        tensors["timestep"] = TensorSpec(timestep.dtype, (BATCH,))
    return tensors, wanted


def _is_stated(found: TensorSpec | None, stated: TensorSpec) -> bool:
    """Whether data type and shape are the same. Dynamic axes may have other names."""
    return (
        found is not None
        and found.dtype == stated.dtype
        and [axis if isinstance(axis, int) else ANY for axis in found.shape]
        == [axis if isinstance(axis, int) else ANY for axis in stated.shape]
    )


def _fits(found: TensorSpec | None, called: TensorSpec, derived: bool) -> bool:
    """Whether a tensor accepts or is what the runtime calls it with."""
    if found is None or len(found.shape) != len(called.shape):
        return False
    if not derived and found.dtype != called.dtype:
        return False
    return all(map(_same_axis, found.shape, called.shape))


def _same_axis(found: int | str, called: int | str) -> bool:
    return isinstance(found, str) or called in (ANY, found)


def _text(tensor: TensorSpec | None) -> str:
    return "without a shape" if tensor is None else f"{tensor.dtype}[{', '.join(map(str, tensor.shape)):.100}]"
