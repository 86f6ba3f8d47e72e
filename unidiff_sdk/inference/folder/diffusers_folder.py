"""A diffusers pipeline of ONNX graphs without our manifest, as optimum exports it: opened for generation only.

The manifest is derived from the configuration files, and each graph is called like those of our own bundles. Such a
folder holds no CLIP, so it cannot search.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.json_values import number_within
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.manifest import (
    DEFAULT_FLOW_SAMPLER,
    DEFAULT_SAMPLER,
    GRAPH_FILE,
    MAX_COUNT,
    TIME_IDS,
    Graph,
    Latent,
    Manifest,
    Prompt,
    SamplerDefaults,
    TensorSpec,
    decode_section,
    fingerprint_of,
    read_json,
)
from unidiff_sdk.inference.schedule import (
    PREDICTION_TYPES,
    Schedule,
    replacement_notice,
    sampler_choice,
    scheduler_refusal,
)

from .files import hash_folder

if TYPE_CHECKING:
    from unidiff_sdk.inference.sessions import Session

__all__ = [
    "PIPELINE_FORMAT",
    "AdaptedSession",
    "derive_manifest",
    "is_pipeline",
    "native_size",
    "refusal",
    "sampler_defaults",
]

PIPELINE_FORMAT = "onnx-pipeline"
"""The `format` of a derived manifest."""

PIPELINE_INDEX = "model_index.json"
MAX_BLOCKS = 16  # of a VAE; models have four
GRAPHS = ("text_encoder", "unet", "vae_decoder")  # "vae_encoder" may be missing
# Set in the configuration of a UNet only if it takes more than latents, a timestep and token states.
EXTRA_CONDITIONS = (
    "addition_embed_type",
    "class_embed_type",
    "num_class_embeds",
    "encoder_hid_dim_type",
    "time_cond_proj_dim",
)

# What UNets with other numbers of input channels do.
OTHER_CHANNELS = {"5": ": depth to image", "7": ": upscaling", "8": ": InstructPix2Pix", "9": ": inpainting"}
OLD_VERSION, OLD_SIZE = 9, 64  # see `native_size`
SCALING_FACTOR = 0.18215  # of diffusers' AutoencoderKL where the file states none, as Stable Diffusion 1's
FEW_STEPS = {"steps": 4, "guidance_scale": 1.0}
"""Of models distilled to few steps without guidance: latent consistency models, Turbo (arXiv:2311.17042), Lightning
(arXiv:2402.13929)."""


def is_pipeline(folder: Path) -> bool:
    """Whether the folder holds what generation needs: the index of a pipeline and its graphs."""
    needed = (PIPELINE_INDEX, *(f"{graph}/{GRAPH_FILE}" for graph in GRAPHS))
    return all((folder / name).is_file() for name in needed)


def refusal(
    unet: Mapping[str, Any], vae: Mapping[str, Any], width: int | None, pooled_width: int | None = None
) -> str | None:
    """Why a UNet and its VAE are not supported, by their configuration. None for those of Stable Diffusion 1, 2 or XL.

    Args:
        unet, vae: the configurations.
        width: of the states of the text encoders, together; None where it is unknown.
        pooled_width: of the pooled embedding of the second text encoder, for Stable Diffusion XL.
    """
    channels, latent_channels, states = (
        unet.get("in_channels"),
        vae.get("latent_channels"),
        unet.get("cross_attention_dim"),
    )
    known = () if pooled_width is None else ("addition_embed_type",)
    extra = [f"{name} {unet[name]}" for name in EXTRA_CONDITIONS if name not in known and unet.get(name) is not None]
    if None not in (channels, latent_channels) and channels != latent_channels:
        extra.append(f"in_channels {channels}{OTHER_CHANNELS.get(str(channels), '')}")
    if extra:
        return (
            f"the UNet takes additional inputs ({', '.join(extra)}), as SDXL without its second text encoder, "
            "inpainting and class-conditioned models do; use a text-to-image model with the architecture of Stable "
            "Diffusion 1, 2 or XL"
        )
    if pooled_width is not None and (refused := _xl_refusal(unet, pooled_width)):
        return refused
    if None not in (channels, unet.get("out_channels")) and channels != unet["out_channels"]:
        return (
            f"the UNet takes {channels} channels and returns {unet['out_channels']}, as models do that also predict "
            "the variance; use one that returns as many as it takes"
        )
    for name in ("latents_mean", "latents_std"):
        if vae.get(name) is not None:
            return (
                f"the VAE states {name}, which diffusers' Stable Diffusion pipeline does not apply; use a VAE without "
                "it, as those of Stable Diffusion 1, 2 and XL"
            )
    if None not in (states, width) and states != width:
        return (
            f"the UNet takes token states of width {states}, but text_encoder/ "
            f"{'returns' if pooled_width is None else 'and text_encoder_2/ return'} {width}: they belong to "
            "different models; export the pipeline again"
        )
    side = unet.get("sample_size")
    if "sample_size" in unet and native_size(unet) is None:
        return f"the UNet's sample_size is {side!r}; it must be one number, or two equal ones: images are square"
    return None


def _xl_refusal(unet: Mapping[str, Any], pooled_width: int) -> str | None:
    """Why a UNet is not that of Stable Diffusion XL, which adds a pooled embedding and sizes to the timestep."""
    kind = unet.get("addition_embed_type")
    if kind != "text_time":
        return (
            f"addition_embed_type of the UNet is {kind!r}, but with a second text encoder it must be 'text_time'; use "
            "a model with the architecture of Stable Diffusion XL"
        )
    taken, sizes = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
    given = TIME_IDS * sizes + pooled_width if isinstance(sizes, int) else None
    if taken != given:
        return (
            f"the UNet takes {taken} added values, but a pooled embedding of width {pooled_width} and {TIME_IDS} sizes "
            f"of width {sizes} are {given}, as for other models than the base of Stable Diffusion XL"
        )
    return None


def native_size(unet: Mapping[str, Any]) -> int | None:
    """The side of the latents that a UNet was trained at, by its configuration; None if they are not square.

    Before version 0.9, diffusers saved Stable Diffusion with a sample_size of 32. Its pipeline reads it as 64.
    """
    size = unet.get("sample_size")
    if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
        return int(size[0]) if isinstance(size[0], int) and size[0] > 0 else None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        return None
    version = re.match(r"0\.(\d{1,6})\.", str(unet.get("_diffusers_version", "")))
    return max(size, OLD_SIZE) if version and int(version[1]) < OLD_VERSION else size


def sampler_defaults(scheduler: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """name, steps and guidance_scale that a model generates with.

    Args:
        scheduler: the scheduler configuration of its pipeline.
        recorded: what the model was made for, if it states that.
    """
    name = sampler_choice(scheduler).name
    if name == DEFAULT_FLOW_SAMPLER["name"]:
        return DEFAULT_FLOW_SAMPLER | dict(recorded or {})
    return DEFAULT_SAMPLER | {"name": name} | (FEW_STEPS if _takes_few_steps(scheduler) else {}) | dict(recorded or {})


def _takes_few_steps(scheduler: Mapping[str, Any]) -> bool:
    """Whether a model was distilled to few steps, by its scheduler.

    Turbo and Lightning have Euler's sampler with "trailing" timesteps, which start at the last one. Other models that
    start there were trained for zero terminal SNR, which needs v prediction.
    """
    name = sampler_choice(scheduler).name
    trailing = scheduler.get("timestep_spacing") == "trailing"
    epsilon = scheduler.get("prediction_type", PREDICTION_TYPES[0]) == "epsilon"
    return name == "lcm" or (name in ("euler", "euler_a") and trailing and epsilon)


def derive_manifest(folder: Path) -> Manifest:
    """The manifest of such a folder, from its configuration files. Its fingerprint is that of the files as they are.

    Raises:
        BundleError: a configuration file is missing or damaged, or the model is not one of Stable Diffusion 1 or 2.
    """
    text, unet, vae = (read_json(folder / name / "config.json") for name in ("text_encoder", "unet", "vae_decoder"))
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if (folder / "text_encoder_2").is_dir():
        raise BundleError(
            f"{folder}: a pipeline with two text encoders, such as Stable Diffusion XL, is opened only as a bundle; "
            "export one: unidiff-export CKPT -o BUNDLE"
        )
    if refused := refusal(unet, vae, text.get("hidden_size")):
        raise BundleError(f"{folder}: {refused}")
    if refused := scheduler_refusal(scheduler):
        raise BundleError(f"{folder}: {refused}")
    try:
        Schedule.from_pipeline(scheduler)
    except BundleError as error:
        raise BundleError(f"{folder}: {error}") from error
    choice = sampler_choice(scheduler)
    if choice.replaces:
        warn(replacement_notice(folder, choice.name, choice.replaces))
    files = hash_folder(folder)
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
            prompt=decode_section(Prompt, {"max_tokens": text["max_position_embeddings"]}, folder),
            latent=decode_section(Latent, _latent(unet, vae), folder),
            sampler=decode_section(
                SamplerDefaults,
                sampler_defaults(scheduler)
                | {
                    "prediction_type": scheduler.get("prediction_type", PREDICTION_TYPES[0]),
                    "replaces": choice.replaces,
                },
                folder,
            ),
            files=files,
            fingerprint=fingerprint_of(files),
        )
    except KeyError as error:
        raise BundleError(f"{folder}: its configuration files lack {error}; export the pipeline again") from error


def _latent(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `Latent`, which checks their types and sizes."""
    blocks = vae["block_out_channels"]
    valid_blocks = isinstance(blocks, list) and 0 < len(blocks) <= MAX_BLOCKS
    return {
        "channels": unet["in_channels"],
        "size": native_size(unet) or unet["sample_size"],
        "scale_factor": 2 ** (len(blocks) - 1) if valid_blocks else blocks,
        "scaling_factor": vae.get("scaling_factor", SCALING_FACTOR),
        "shift_factor": 0.0,  # diffusers' Stable Diffusion pipeline ignores that of the VAE
    }


def _inputs(unet: Mapping[str, Any]) -> dict[str, dict[str, TensorSpec]]:
    """The inputs of each graph, as our own bundles have them."""
    channels, width = (
        int(number_within(name, unet[name], 1, MAX_COUNT, BundleError, whole=True))
        for name in ("in_channels", "cross_attention_dim")
    )
    latents = TensorSpec("float32", ("batch", channels, "height", "width"))
    return {
        "text_encoder": {"input_ids": TensorSpec("int64", ("batch", "tokens"))},
        "unet": {
            "sample": latents,
            "timestep": TensorSpec("float32", ("batch",)),
            "encoder_hidden_states": TensorSpec("float32", ("batch", "tokens", width)),
        },
        "vae_decoder": {"latent_sample": latents},
        "vae_encoder": {"sample": TensorSpec("float32", ("batch", 3, "height", "width"))},
    }


# Outputs by the exporter's name, and by ours.
_OUTPUTS = {"latent_parameters": "latent_sample"}


class AdaptedSession:
    """A graph of another exporter, called as one of ours: float32 in and out, a timestep for each sample.

    Exporters differ in the dtypes of token ids and timesteps, give half-precision graphs half-precision inputs, take a
    single timestep for all samples, and return the mean and the logarithm of the variance of the VAE encoder in one
    output.
    """

    def __init__(self, session: Session, graph: Graph) -> None:
        self.inputs = graph.inputs
        self.outputs = {_OUTPUTS.get(name, name): _output(name, tensor) for name, tensor in session.outputs.items()}
        self.providers, self.captured = session.providers, session.captured
        self._session = session
        self._single_timestep = "timestep" in session.inputs and not session.inputs["timestep"].shape

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        if not self._single_timestep:
            return self._call(feeds, outputs)
        # One call for each different timestep; in a batch of one request they are all equal.
        timesteps, which = np.unique(feeds["timestep"], return_inverse=True)
        parts = [
            self._call({name: array[which == i] for name, array in feeds.items()} | {"timestep": timestep}, outputs)
            for i, timestep in enumerate(timesteps)
        ]
        order = np.argsort(np.argsort(which, kind="stable"))
        return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}

    def _call(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        typed = {name: np.asarray(array, self._session.inputs[name].dtype) for name, array in feeds.items()}
        exported = {_OUTPUTS.get(name, name): name for name in self._session.outputs}
        names = [exported.get(name, name) for name in (self.outputs if outputs is None else outputs)]
        results = {}
        for name, array in self._session.run(typed, names).items():
            result = np.asarray(array, np.float32)
            # Only the mean of the VAE encoder; the other half of the channels is the variance.
            results[_OUTPUTS.get(name, name)] = result[:, : result.shape[1] // 2] if name in _OUTPUTS else result
        return results


def _output(name: str, tensor: TensorSpec) -> TensorSpec:
    """An output as `AdaptedSession` returns it."""
    shape = list(tensor.shape)
    if name in _OUTPUTS and isinstance(shape[1], int):
        shape[1] //= 2
    return TensorSpec("float32", tuple(shape))
