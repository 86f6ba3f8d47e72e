"""A diffusers pipeline of ONNX graphs that has no manifest of ours, as optimum exports it: opened for generation.

The manifest is derived from the configuration files, and each graph is called by the interface of our own bundles. Such
a folder holds no CLIP, so nothing can be searched with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import BundleError

from .manifest import (
    DEFAULT_SAMPLER,
    GRAPH_FILE,
    Graph,
    Latent,
    Manifest,
    Prompt,
    SamplerDefaults,
    TensorSpec,
    file_sha256,
    fingerprint_of,
    read_json,
)
from .schedule import PREDICTION_TYPES

__all__ = ["PIPELINE_FORMAT", "AdaptedSession", "derive_manifest", "is_pipeline", "refusal"]

PIPELINE_FORMAT = "onnx-pipeline"
"""The `format` of a derived manifest."""

PIPELINE_INDEX = "model_index.json"
GRAPHS = ("text_encoder", "unet", "vae_decoder")  # "vae_encoder" may be missing
# What a UNet's configuration holds only if it wants more than latents, a timestep and text states.
EXTRA_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds what generation needs: a pipeline's index and its graphs."""
    needed = (PIPELINE_INDEX, *(f"{graph}/{GRAPH_FILE}" for graph in GRAPHS))
    return all((folder / name).is_file() for name in needed)


def refusal(unet: Mapping[str, Any], latent_channels: int | None, width: int | None) -> str | None:
    """Why a UNet, by its configuration, is driven by more than latents, a timestep and the text encoder's states.

    latent_channels: of the VAE; width: of the text encoder's states; None where they are not known. Returns None for a
    UNet that is driven by these.
    """
    extra = [f"{name} {unet[name]}" for name in EXTRA_CONDITIONS if unet.get(name) is not None]
    channels, states = unet.get("in_channels"), unet.get("cross_attention_dim")
    if None not in (channels, latent_channels) and channels != latent_channels:
        extra.append(f"in_channels {channels}")
    if extra:
        return (
            f"the UNet takes extra conditions ({', '.join(extra)}), as SDXL, inpainting and class-conditioned models "
            "do; only text-to-image models of the shape of Stable Diffusion 1 and 2 are supported"
        )
    if None not in (states, width) and states != width:
        return (
            f"the UNet is conditioned by states of width {states}, but text_encoder/ gives {width}: they belong to "
            "different models"
        )
    return None


def derive_manifest(folder: Path) -> Manifest:
    """The manifest of such a folder, from its configuration files. Its fingerprint is that of the files as they are.

    Raises:
        BundleError: a configuration file is missing or damaged, or the model is not one of Stable Diffusion 1 or 2.
    """
    text, unet, vae = (read_json(folder / name / "config.json") for name in ("text_encoder", "unet", "vae_decoder"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if refused := refusal(unet, vae.get("latent_channels"), text.get("hidden_size")):
        raise BundleError(f"{folder}: {refused}")
    paths = sorted(file for file in folder.rglob("*") if file.is_file())
    files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in paths}
    try:
        return Manifest(
            format=PIPELINE_FORMAT,
            name=folder.resolve().name,
            precision="fp32",
            graphs={
                name: Graph(f"{name}/{GRAPH_FILE}", inputs=inputs)
                for name, inputs in _inputs(unet).items()
                if (folder / name / GRAPH_FILE).is_file()
            },
            prompt=Prompt(text["max_position_embeddings"]),
            latent=Latent(
                channels=unet["in_channels"],
                size=unet["sample_size"],
                scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
                scaling_factor=vae["scaling_factor"],
                shift_factor=vae.get("shift_factor") or 0.0,
            ),
            sampler=SamplerDefaults(
                **DEFAULT_SAMPLER, prediction_type=scheduler.get("prediction_type", PREDICTION_TYPES[0])
            ),
            files=files,
            fingerprint=fingerprint_of(files),
        )
    except KeyError as error:
        raise BundleError(f"{folder}: its configuration files lack {error}; export the pipeline again") from error


def _inputs(unet: Mapping[str, Any]) -> dict[str, dict[str, TensorSpec]]:
    """The inputs of each graph, as our own bundles have them."""
    latents = TensorSpec("float32", ("batch", unet["in_channels"], "height", "width"))
    return {
        "text_encoder": {"input_ids": TensorSpec("int64", ("batch", "tokens"))},
        "unet": {
            "sample": latents,
            "timestep": TensorSpec("float32", ("batch",)),
            "encoder_hidden_states": TensorSpec("float32", ("batch", "tokens", unet["cross_attention_dim"])),
        },
        "vae_decoder": {"latent_sample": latents},
        "vae_encoder": {"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
    }


class AdaptedSession:
    """A graph as its exporter made it, called as one of ours: float32 in and out, a timestep for each sample.

    Exporters differ in the types of ids and timesteps, give half precision half inputs, take a single timestep for all
    samples, and leave the VAE encoder's mean and logarithm of variance in one output.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._types = {value.name: _numpy_type(value.type) for value in session.get_inputs()}
        self._single_timestep = any(v.name == "timestep" and not v.shape for v in session.get_inputs())
        self._outputs = [value.name for value in session.get_outputs()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, outputs: Sequence[str] | None, inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        if not self._single_timestep or "timestep" not in inputs:
            return self._call(outputs, inputs)
        # One call for each timestep that is asked for; in a batch of one request they are all the same.
        steps, which = np.unique(inputs["timestep"], return_inverse=True)
        parts = [
            self._call(outputs, {name: array[which == i] for name, array in inputs.items()} | {"timestep": step})
            for i, step in enumerate(steps)
        ]
        order = np.argsort(np.argsort(which, kind="stable"))
        return [np.concatenate(results)[order] for results in zip(*parts, strict=True)]

    def _call(self, outputs: Sequence[str] | None, inputs: dict[str, Any]) -> list[NDArray[Any]]:
        typed = {name: np.asarray(array, self._types[name]) for name, array in inputs.items()}
        wanted = list(outputs or self._outputs)
        moments = "latent_sample" in wanted and "latent_sample" not in self._outputs
        named = ["latent_parameters" if moments and name == "latent_sample" else name for name in wanted]
        missing = [name for name in named if name not in self._outputs]
        if missing:
            raise BundleError(f"the graph gives {', '.join(self._outputs)}, but {', '.join(missing)} is needed")
        results = [np.asarray(result, np.float32) for result in self._session.run(named, typed)]
        if moments:
            at = named.index("latent_parameters")
            results[at] = results[at][:, : results[at].shape[1] // 2]  # the mean; the other half is its variance
        return results


def _numpy_type(onnx_type: str) -> type[np.generic]:
    """`tensor(float16)` as numpy's type."""
    types: dict[str, type[np.generic]] = {
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int64)": np.int64,
        "tensor(int32)": np.int32,
    }
    return types[onnx_type]
