"""manifest.json: what a bundle holds and how its graphs are called. The export writes it, the runtime reads it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from unidiff_sdk._internal import json_values
from unidiff_sdk._internal.files import is_plain_path, read_regular_file
from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import BundleError

__all__ = [
    "DEFAULT_FLOW_SAMPLER",
    "DEFAULT_RERANK",
    "DEFAULT_SAMPLER",
    "FORMAT",
    "GENERATION_GRAPHS",
    "GRAPH_FILE",
    "MANIFEST",
    "SCHEMA_VERSION",
    "TIME_IDS",
    "TRANSFORMER",
    "UNET",
    "Conditioning",
    "Denoiser",
    "Embedding",
    "Graph",
    "ImageInput",
    "Interpolation",
    "JointConditioning",
    "Latent",
    "Manifest",
    "ModelDescription",
    "Patches",
    "Profile",
    "Prompt",
    "RerankDefaults",
    "RerankGain",
    "Resize",
    "SamplerDefaults",
    "SwitchableLora",
    "TensorSpec",
    "decode_section",
    "file_sha256",
    "fingerprint_of",
    "manifest_checksum",
    "parse_object",
    "read_json",
    "to_json",
]

FORMAT = "unidiff-bundle"
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
GRAPH_FILE = "model.onnx"
GRAPH_SUFFIX = ".onnx"
GENERATION_GRAPHS = frozenset({"unet", "transformer", "vae_decoder", "vae_encoder"})

DEFAULT_SAMPLER: dict[str, Any] = {"name": "dpm++2m", "steps": 20, "guidance_scale": 5.0}
"""For models that name no sampler of their own."""

DEFAULT_FLOW_SAMPLER: dict[str, Any] = {"name": "flow_euler", "steps": 28, "guidance_scale": 4.5}
"""For flow matching models: the steps of diffusers' pipeline, the guidance of the model card of 3.5 medium."""

Section = TypeVar("Section")

Profile = Mapping[str, Mapping[str, Sequence[int]]]
"""The smallest, usual and largest shape of each input of a graph: {"sample": {"min": …, "opt": …, "max": …}, …}."""

MAX_COUNT = 65_536
"""The largest number of tokens, dimensions, channels, steps or pixels on a side. They size buffers."""

TIME_IDS = 6
"""The sizes that condition Stable Diffusion XL: height and width of the original image, top and left of the crop, and
height and width of the result."""

MAX_IMAGE_SIDE = 4096
"""The largest side of what the image encoder takes, in pixels. The pixels of one such image take 192 MiB."""

MAX_ELEMENTS = 1 << 28
"""The largest number of elements of an input at its usual shape, 1 GiB of float32: `warmup` allocates it."""

DTYPES = (
    *("float16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
)
"""The data types of inputs and outputs."""

Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]

# Types of fields: the annotations below are the schema that a manifest is read by, with the limits of numbers.
Count = Annotated[int, 1, MAX_COUNT]
Size = Annotated[int, 1, 1 << 62]  # bytes
Positive = Annotated[float, 1e-6, 1e6]
Offset = Annotated[float, -1e6, 1e6]
Share = Annotated[float, 0, 1]


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: a NumPy dtype, and an int for each fixed axis, a name for each dynamic one."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph.

    Attributes:
        file: relative to the bundle.
        precision: "fp32", "fp16" or "int8"; a graph may keep a higher precision than its bundle.
        inputs, outputs: by name.
        attention_nodes: number of fused attention operators.
        bytes: size of the graph and its weights.
        int8: which layers are quantized.
        channels_last: whether the graph was rewritten for channels-last kernels of CUDA.
        profile: the shapes that the graph is used at.
        extra: further entries, kept as they are.
    """

    file: str
    precision: str = "fp32"
    inputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    outputs: Mapping[str, TensorSpec] = field(default_factory=dict)
    attention_nodes: int | None = None
    bytes: Size | None = None
    int8: Mapping[str, Any] | None = None
    channels_last: bool | None = None
    profile: Profile | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The space of the encoders.

    Attributes:
        dim: length of an embedding.
        shared_text_encoder: whether one text encoder serves search and generation.
        conditioning_layer: the hidden layer whose states condition the UNet.
        max_tokens: length that texts are padded or truncated to for search.
        logit_scale: factor from cosines to logits in contrastive training, the inverse temperature.
        logit_bias: added to these logits by models that were trained with the sigmoid loss.
    """

    dim: Count
    shared_text_encoder: bool | None = None
    conditioning_layer: Annotated[int, -MAX_COUNT, MAX_COUNT] | None = None
    max_tokens: Count
    logit_scale: Positive | None = None
    logit_bias: Offset | None = None


@dataclass(frozen=True)
class Prompt:
    """max_tokens: length that prompts are padded or truncated to for generation."""

    max_tokens: Count


@dataclass(frozen=True)
class Conditioning:
    """What conditions the UNet of Stable Diffusion XL: two text encoders, a pooled embedding and sizes.

    Attributes:
        states: the output of the graph "text_encoder", and that of "text_encoder_2". Their states are concatenated.
        pooled_width: width of the pooled embedding, the output "text_embeds" of "text_encoder_2".
        zero_negative: whether zeros stand for an empty negative prompt, diffusers' `force_zeros_for_empty_prompt`.
    """

    states: tuple[str, str]
    pooled_width: Count
    zero_negative: bool


@dataclass(frozen=True)
class JointConditioning:
    """What conditions the transformer of Stable Diffusion 3, which attends to text and image together.

    The states of two text encoders are concatenated along their width, and padded with zeros to the width of a third
    one, whose states follow them. Without the third one, zeros stand for its states.

    Attributes:
        states: the output of the graph "text_encoder", and that of "text_encoder_2".
        width: of the token states that the transformer takes.
        third_tokens: number of token states of the third text encoder.
        pooled_width: width of the pooled embeddings of the first two together, their outputs "text_embeds".
    """

    states: tuple[str, str]
    width: Count
    third_tokens: Count
    pooled_width: Count


class Denoiser(NamedTuple):
    """The graph that denoises, with the names of the latents that it takes and of what it returns."""

    graph: str
    sample: str
    output: str


UNET = Denoiser("unet", "sample", "out_sample")
TRANSFORMER = Denoiser("transformer", "hidden_states", "out_hidden_states")


@dataclass(frozen=True)
class Resize:
    """How an image is resized before the crop.

    Attributes:
        side: what the shorter edge is resized to, in pixels. The aspect ratio stays.
        squash: whether both edges are resized to it.
        interpolation: the filter of Pillow.
    """

    side: Annotated[int, 1, MAX_IMAGE_SIDE]
    squash: bool = False
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True)
class Patches:
    """What a NaFlex image encoder takes: an image of any aspect ratio as a list of square patches, padded with zeros.

    Attributes:
        side: of a patch, in pixels.
        count: the most patches of an image, and the length of the list.
        interpolation: the filter of Pillow.
    """

    side: Annotated[int, 1, 256]
    count: Annotated[int, 1, 4096]
    interpolation: Interpolation = "bilinear"

    @property
    def width(self) -> int:
        """Number of values of a patch."""
        return 3 * self.side**2


@dataclass(frozen=True)
class ImageInput:
    """What the image encoder takes: squares of `size` pixels, normalized by `mean` and `std` of each channel.

    Attributes:
        fit: how images become squares: "crop" their center, or "pad" them.
        resize: before a crop. None: the shorter edge to `size` by bicubic interpolation.
        patches: the encoder takes patches instead of squares; `size` is then the side of a square image.
    """

    size: Annotated[int, 1, MAX_IMAGE_SIDE]
    mean: tuple[Offset, Offset, Offset]
    std: tuple[Positive, Positive, Positive]
    fit: Fit = "crop"
    resize: Resize | None = None
    patches: Patches | None = None


@dataclass(frozen=True)
class Latent:
    """The latents of the VAE.

    Attributes:
        channels: number of channels.
        size: side that the UNet was trained at.
        scale_factor: pixels for each latent position, along one side.
        scaling_factor, shift_factor: latents of the UNet are (latents of the VAE - shift_factor) * scaling_factor.
    """

    channels: Count
    size: Count
    scale_factor: Count
    scaling_factor: Positive
    shift_factor: Offset


@dataclass(frozen=True)
class SamplerDefaults:
    """What a generation uses where the caller names nothing else.

    Attributes:
        name: the sampler.
        replaces: the scheduler of the base model that the sampler stands in for, if the runtime does not have it.
    """

    name: str
    steps: Count
    guidance_scale: Positive
    prediction_type: str | None = None
    replaces: str | None = None


@dataclass(frozen=True)
class SwitchableLora:
    """A LoRA that a generation can switch on.

    Attributes:
        weight: of its change, where a generation states none.
        files: its factors for each graph that it changes, relative to the bundle.
        psnr_db: PSNR of the worst image with it, compared with diffusers.
    """

    weight: Annotated[float, -10, 10]
    files: Mapping[str, str]
    psnr_db: float | None = None


@dataclass(frozen=True)
class RerankGain:
    """What re-ranking gained on captions that its defaults were not chosen with.

    Attributes:
        recall_at_1: the share of captions whose own item was the first hit of the encoder, 0 to 1.
        reranked_recall_at_1: the same after re-ranking.
        queries: number of captions.
        gallery: number of items that were searched.
    """

    recall_at_1: Share
    reranked_recall_at_1: Share
    queries: Count
    gallery: Size


@dataclass(frozen=True)
class RerankDefaults:
    """How `search(rerank=)` measures denoising errors, and what it gained (`retrieval.reranking`).

    Attributes:
        timesteps: the training timesteps at which errors are measured, each with a call of the UNet for each candidate.
        candidates: the number of hits that `rerank=True` re-ranks.
        weight: the weight of the generator against the encoder, in standard deviations of both.
        noise_seed: the seed of the noise, 0 or more.
        gain: None if it was not measured.
    """

    timesteps: tuple[Annotated[int, 0, MAX_COUNT], ...]
    candidates: Count
    weight: Positive
    noise_seed: Annotated[int, 0, (1 << 63) - 1] = 0
    gain: RerankGain | None = None


DEFAULT_RERANK = RerankDefaults(timesteps=(650, 750, 850, 950), candidates=8, weight=1.0)
"""For bundles without their own, whose model has 1,000 training timesteps; for others in proportion."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Sizes and defaults of the models in a bundle.

    A model that only generates has no `embedding` and `image`. One that only searches has no `latent` and `sampler`.

    Attributes:
        loras: the LoRAs that can be switched, by name.
        conditioning: of Stable Diffusion XL.
        joint_conditioning: of Stable Diffusion 3. None, as `conditioning`: the states of one text encoder condition the
            UNet.
        synthetic: whether the model has been trained on rendered images alone, and knows no photographs.
    """

    embedding: Embedding | None = None
    prompt: Prompt | None = None
    image: ImageInput | None = None
    latent: Latent | None = None
    sampler: SamplerDefaults | None = None
    conditioning: Conditioning | None = None
    joint_conditioning: JointConditioning | None = None
    loras: Mapping[str, SwitchableLora] = field(default_factory=dict)
    synthetic: bool = False

    @property
    def purpose(self) -> str:
        """What the model can do: "search and generation", "search only" or "generation only"."""
        if self.embedding is None:
            return "generation only"
        return "search only" if self.latent is None else "search and generation"

    @property
    def prompt_tokens(self) -> int:
        """The length, in tokens, that prompts are padded or truncated to."""
        return cast(Prompt | Embedding, self.prompt or self.embedding).max_tokens

    @property
    def state_tokens(self) -> int:
        """The number of token states that condition the denoiser, for a prompt that is not too long."""
        return self.prompt_tokens + (self.joint_conditioning.third_tokens if self.joint_conditioning else 0)

    @property
    def denoiser(self) -> Denoiser:
        """The graph that denoises: a transformer in Stable Diffusion 3, a UNet in other models."""
        return UNET if self.joint_conditioning is None else TRANSFORMER

    @property
    def text_states(self) -> dict[str, str]:
        """The text encoders that condition the denoiser, each with the output that does."""
        both = self.conditioning or self.joint_conditioning
        if both is None:
            return {"text_encoder": "last_hidden_state"}
        return dict(zip(("text_encoder", "text_encoder_2"), both.states, strict=True))


@dataclass(frozen=True, kw_only=True)
class Manifest(ModelDescription):
    """A bundle's manifest.

    Attributes:
        name: of the bundle.
        precision: "fp32", "fp16" or "int8": what the weights are stored and computed in.
        graphs: by name.
        files: SHA-256 of each file by its relative POSIX path.
        fingerprint: `fingerprint_of(files)`.
        target, opset, devices: what the graphs were exported for. `devices` is None if any device may run them.
        created, sdk_version: when and by which version.
        parity: how close the graphs are to PyTorch.
        rerank: the defaults of `search(rerank=)`, chosen and measured on data; None if no data was given.
        export: time and memory that the export took.
        format: another than FORMAT only for a manifest that was derived from a diffusers folder.
        extra: further entries, kept as they are.
    """

    name: str
    precision: str
    graphs: Mapping[str, Graph]
    files: Mapping[str, str]
    fingerprint: str
    target: str | None = None
    opset: Count | None = None
    devices: tuple[str, ...] | None = None
    created: str | None = None
    sdk_version: str | None = None
    parity: Mapping[str, Any] = field(default_factory=dict)
    rerank: RerankDefaults | None = None
    export: Mapping[str, Any] | None = None
    format: str = FORMAT
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest of a bundle folder. The files themselves are not read.

        Raises:
            BundleError: it is missing, damaged, changed since the export, or of a newer schema version. The message
                names the field, its value, and what is accepted.
        """
        file = folder / MANIFEST
        return cls.from_json(read_json(file), file)

    @classmethod
    def parse(cls, content: bytes, file: Path) -> Manifest:
        """The same from the bytes of `file`, for a caller that checks their signature."""
        return cls.from_json(parse_object(content, file), file)

    @classmethod
    def from_json(cls, values: Mapping[str, Any], file: Path) -> Manifest:
        """The same from the content of `file`."""
        _check_version(values, file)
        manifest = decode_section(cls, values, file)
        _check_content(manifest, file)
        if "checksum" not in values:
            raise BundleError(f"{file}: checksum is missing, so changes cannot be found; export the bundle again")
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json, with its checksum. `read` returns an equal manifest."""
        values: dict[str, Any] = {
            "format": self.format,
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "created": self.created,
            "sdk_version": self.sdk_version,
            "precision": self.precision,
            "target": self.target,
            "opset": self.opset,
            "devices": self.devices,
            "graphs": self.graphs,
            "embedding": self.embedding,
            "prompt": self.prompt,
            "conditioning": self.conditioning,
            "joint_conditioning": self.joint_conditioning,
            "image": self.image,
            "latent": self.latent,
            "sampler": self.sampler,
            "loras": self.loras or None,
            "synthetic": self.synthetic,
            "files": self.files,
            "parity": self.parity,
            "rerank": self.rerank,
            "fingerprint": self.fingerprint,
            "export": self.export,
            **self.extra,
        }
        content = {name: to_json(value) for name, value in values.items() if value is not None}
        return content | {"checksum": manifest_checksum(content)}


def to_json(value: Any) -> Any:
    """A dataclass of this module as JSON values, without the fields that are None."""
    if is_dataclass(value):
        named = {entry.name: getattr(value, entry.name) for entry in fields(value)}
        extra = named.pop("extra", {})
        return {name: to_json(one) for name, one in (named | extra).items() if one is not None}
    if isinstance(value, Mapping):
        return {name: to_json(one) for name, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, (list, tuple)) else value


# Hashes


def file_sha256(file: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fingerprint_of(files: Mapping[str, str]) -> str:
    """A bundle's fingerprint: the SHA-256 of the map of its files' hashes, as compact JSON with sorted keys."""
    return hashlib.sha256(_canonical(files)).hexdigest()


def manifest_checksum(content: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest's content without its own "checksum", as compact JSON with sorted keys."""
    return hashlib.sha256(_canonical({key: value for key, value in content.items() if key != "checksum"})).hexdigest()


def _canonical(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# Reading


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises BundleError if the file is missing or holds something else."""
    if not file.exists():
        raise BundleError(f"{file}: the file is missing; export the bundle again")
    return parse_object(read_regular_file(file, json_values.MAX_DOCUMENT, BundleError), file)


def parse_object(content: bytes, file: Path) -> dict[str, Any]:
    """The JSON object in the content of `file`. Raises BundleError if it holds something else."""
    try:
        value = json_values.parse_json(content, str(file), error=BundleError, kind=object, nan=True)
    except BundleError as error:
        raise BundleError(f"{file}: cannot be read as JSON ({error}); export the bundle again") from error
    if not isinstance(value, dict):
        raise BundleError(f"{file}: must hold a JSON object, not {type(value).__name__}; export the bundle again")
    return value


def _check_version(values: Mapping[str, Any], file: Path) -> None:
    if values.get("format") != FORMAT:
        raise BundleError(f"{file}: format is {values.get('format')!r}, not {FORMAT!r}; this is not a bundle")
    version = values.get("schema_version")
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise BundleError(
            f"{file}: schema_version is {version!r}, but this version of unidiff-sdk reads {SCHEMA_VERSION}; "
            + ("upgrade unidiff-sdk" if newer else "export the bundle again")
        )
    if "checksum" in values and manifest_checksum(values) != values["checksum"]:
        raise BundleError(f"{file}: was changed after the export (its checksum differs); export the bundle again")


def _check_content(manifest: Manifest, file: Path) -> None:
    """Check the rules that involve several fields, and the paths of the files."""
    generates = not GENERATION_GRAPHS.isdisjoint(manifest.graphs) or manifest.latent or manifest.sampler
    for name in ("embedding", "image", *(("latent", "sampler") if generates else ())):
        if getattr(manifest, name) is None:
            raise BundleError(f"{file}: {name} is missing; it must be a JSON object")
    for name in manifest.files:
        if not is_plain_path(name):
            raise BundleError(
                f"{file}: files names {name!r:.200}, which lies outside the bundle or is not a plain path; export the "
                "bundle again"
            )
    for name, graph in manifest.graphs.items():
        if graph.file not in manifest.files:
            raise BundleError(
                f"{file}: graphs.{name}.file is {graph.file!r:.200}; it must be one of the files of the bundle"
            )
        _check_tensors(graph, f"{file}: graphs.{name}")
        if not graph.file.endswith(GRAPH_SUFFIX):  # ONNX Runtime reads other formats by their suffix
            raise BundleError(f"{file}: graphs.{name}.file is {graph.file!r:.200}; it must end with {GRAPH_SUFFIX}")
    for name, lora in manifest.loras.items():
        for adapted, path in lora.files.items():
            if adapted not in manifest.graphs or path not in manifest.files:
                raise BundleError(
                    f"{file}: loras.{name:.60} names {path!r:.200} for {adapted!r:.60}; they must be one of the files "
                    "and one of the graphs of the bundle"
                )
    if manifest.image is not None and manifest.image.resize is not None and manifest.image.fit != "crop":
        raise BundleError(f"{file}: image.fit is {manifest.image.fit!r}; with image.resize it must be crop")
    if manifest.conditioning is not None and manifest.joint_conditioning is not None:
        raise BundleError(f"{file}: conditioning and joint_conditioning belong to different models; export it again")
    if (TRANSFORMER.graph in manifest.graphs) != (manifest.joint_conditioning is not None):
        raise BundleError(
            f"{file}: the graph {TRANSFORMER.graph} and the section joint_conditioning belong together, but one of "
            "them is missing; export the bundle again"
        )
    if manifest.rerank is not None and not manifest.rerank.timesteps:
        raise BundleError(f"{file}: rerank.timesteps is empty; it must list at least one timestep")
    if fingerprint_of(manifest.files) != manifest.fingerprint:
        raise BundleError(f"{file}: the fingerprint does not match the list of files; export the bundle again")


def _check_tensors(graph: Graph, where: str) -> None:
    """Check data types, and that the profile gives each input three shapes that it can have."""
    for name, tensor in (*graph.inputs.items(), *graph.outputs.items()):
        if tensor.dtype not in DTYPES:
            raise BundleError(
                f"{where} gives {name!r:.60} the dtype {tensor.dtype!r:.60}; use one of {', '.join(DTYPES)}"
            )
    if graph.profile is None:
        return
    if graph.profile.keys() != graph.inputs.keys():
        raise BundleError(
            f"{where}.profile names {', '.join(graph.profile):.200}, which are not the inputs of the graph"
        )
    for name, bounds in graph.profile.items():
        rank = len(graph.inputs[name].shape)
        shapes = [bounds.get(bound, ()) for bound in ("min", "opt", "max")]
        valid = all(len(shape) == rank for shape in shapes) and all(
            0 < least <= usual <= most <= MAX_COUNT for least, usual, most in zip(*shapes, strict=True)
        )
        if not valid or math.prod(shapes[1]) > MAX_ELEMENTS:
            raise BundleError(
                f"{where}.profile.{name} is {dict(bounds)!r:.120}; it must be min, opt and max: each {rank} rising "
                f"sizes from 1 to {MAX_COUNT:,}, and opt at most {MAX_ELEMENTS:,} elements"
            )


def decode_section(kind: type[Section], values: Mapping[str, Any], file: object) -> Section:
    """A dataclass of this module from JSON values. Raises BundleError that names the field and what is accepted."""
    try:
        section: Section = _decode_dataclass(kind, values, "")
    except _InvalidField as error:
        raise BundleError(f"{file}: {error}") from None
    return section


class _InvalidField(Exception):
    """A field, its value, and what is accepted."""


def _decode(kind: Any, value: Any, path: str) -> Any:
    """JSON `value` as a type annotation of this module. Raises _InvalidField."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        if isinstance(value, dict):
            return _decode_dataclass(cast(type, kind), value, path)
    elif origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        members = [member for member in arguments if member is not NoneType]
        if len(members) == 1 or type(value) in members:
            return _decode(members[0] if len(members) == 1 else type(value), value, path)
    elif origin is Annotated:
        if _is_a(arguments[0], value) and arguments[1] <= value <= arguments[2]:
            return value
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is Mapping:
        if isinstance(value, dict):
            return {name: _decode(arguments[1], one, f"{path}.{name}") for name, one in value.items()}
    elif origin is Sequence:
        if isinstance(value, list):
            return [_decode(arguments[0], one, f"{path}[{i}]") for i, one in enumerate(value)]
    elif origin is tuple:
        if isinstance(value, list) and (arguments[-1] is Ellipsis or len(value) == len(arguments)):
            return tuple(_decode(arguments[0], one, f"{path}[{i}]") for i, one in enumerate(value))
    elif kind is Any or _is_a(kind, value):
        return value
    raise _InvalidField(f"{path} is {value!r:.80}; it must be {_accepted(kind)}")


def _decode_dataclass(kind: type, values: Mapping[str, Any], path: str) -> Any:
    hints, found = _hints(kind), {}
    for entry in fields(kind):
        where = f"{path}.{entry.name}" if path else entry.name
        if entry.name == "extra":
            known = {each.name for each in fields(kind)} | {"schema_version", "checksum"}
            found["extra"] = {name: value for name, value in values.items() if name not in known}
        elif entry.name in values:
            found[entry.name] = _decode(hints[entry.name], values[entry.name], where)
        elif entry.default is MISSING and entry.default_factory is MISSING:
            raise _InvalidField(f"{where} is missing; it must be {_accepted(hints[entry.name])}")
    return kind(**found)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _is_a(kind: type, value: Any) -> bool:
    """Whether a JSON value is a finite number, a text or a boolean; a boolean is no number."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is kind


def _accepted(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        low, high = (f"{limit:,}" if isinstance(limit, int) else f"{limit:g}" for limit in arguments[1:])
        return f"{_accepted(arguments[0])} from {low} to {high}"
    if origin in (Union, UnionType):
        return " or ".join(_accepted(member) for member in arguments if member is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin is Sequence or (origin is tuple and arguments[-1] is Ellipsis):
        return f"a list, each of it {_accepted(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each of it {_accepted(arguments[0])}"
    names = {str: "a text", bool: "true or false", int: "an integer", float: "a number"}
    return names.get(kind, "a JSON object")
