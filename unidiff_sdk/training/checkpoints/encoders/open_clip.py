"""Conversion of OpenCLIP models to transformers' `CLIPModel`, which has the same architecture with other tensor names.

A model is named `open_clip:ARCH/TAG` (downloaded by the open_clip package), `open_clip:ARCH/FILE.safetensors`, or
`open_clip:FOLDER`, a folder with open_clip_config.json and open_clip_model.safetensors as on the Hugging Face hub.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from unidiff_sdk._internal.json_values import read_json
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import CheckpointError, OptionError

from .image_preprocessing import image_processor_class

__all__ = ["PREFIX", "ConvertedOpenClip", "convert", "load_open_clip", "open_clip_tokenizer"]

PREFIX = "open_clip:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
VOCABULARY, MERGES = "bpe_simple_vocab_16e6.txt.gz", 48_894  # the merges that CLIP uses of the file
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
INSTALL = "Run `pip install open_clip_torch` in an environment whose torchvision matches its torch."
# Settings that CLIPModel supports. Any other setting means another architecture.
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"}
NO_EFFECT = {"patch_dropout", "output_tokens"}
# The preprocessing that is followed. Settings that a configuration leaves out have the first value in OpenCLIP.
PREPROCESSING = {"resize_mode": ("shortest", "squash"), "interpolation": ("bicubic", "bilinear"), "mode": ("RGB",)}
# Mean and standard deviation of the RGB channels in OpenAI's CLIP training, also OpenCLIP's default.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# OpenCLIP's tensor names, prefixes of norms and prefixes within a layer, and those of transformers.
RENAMED_TENSORS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
RENAMED_NORMS = {  # "pre_layrnorm" is the spelling of transformers
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "ln_final.": "text_model.final_layer_norm.",
}
RENAMED_IN_LAYERS = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}


@dataclass(frozen=True)
class ConvertedOpenClip:
    """A converted model and its preprocessing.

    Attributes:
        clip: The model.
        image_processor: The image processor of transformers with the same steps.
    """

    clip: CLIPModel
    image_processor: Any


def load_open_clip(name: str) -> ConvertedOpenClip:
    """Load an OpenCLIP model by name (see the module). Raises CheckpointError if it is missing or not supported."""
    spec = name.removeprefix(PREFIX)
    architecture, _, weights = spec.partition("/")
    preprocessing: Mapping[str, Any] = {}
    if (Path(spec) / CONFIG).is_file():
        content = _json(Path(spec) / CONFIG)
        config, preprocessing, file = content["model_cfg"], content.get("preprocess_cfg", {}), Path(spec) / WEIGHTS
    elif architecture and weights:
        config, file = _architecture(architecture), Path(weights)
        if not file.exists():
            pretrained, file = _download(architecture, weights)
            config = config | {"quick_gelu": config.get("quick_gelu", False) or pretrained.get("quick_gelu", False)}
            preprocessing = pretrained
    else:
        raise CheckpointError(
            f"{name!r} names no OpenCLIP model. Write {PREFIX}ARCHITECTURE/TAG, {PREFIX}ARCHITECTURE/FILE.safetensors, "
            f"or {PREFIX}FOLDER for a folder with {CONFIG}."
        )
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is not a safetensors file. Only safetensors are read; convert it first.")
    _check_preprocessing(preprocessing, int(config["vision_cfg"].get("image_size", 224)), name)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"Cannot read {file}: {error}") from error
    clip = convert(config, tensors, name)
    warn(
        f"{name}: texts are tokenized as by transformers' CLIPTokenizer. OpenCLIP also repairs broken encodings, "
        "decodes HTML entities and straightens quotation marks first. Clean such texts before you use them"
    )
    return ConvertedOpenClip(clip, _image_processor(preprocessing, int(clip.config.vision_config.image_size)))


def _image_processor(preprocessing: Mapping[str, Any], size: int) -> Any:
    """The image processor of transformers with the steps of OpenCLIP."""
    square = {"height": size, "width": size}
    squash = preprocessing.get("resize_mode") == "squash"
    steps = {"size": square} if squash else {"size": {"shortest_edge": size}, "crop_size": square}
    return image_processor_class("SiglipImageProcessor" if squash else "CLIPImageProcessor")(
        resample=int(Image.Resampling[(preprocessing.get("interpolation") or "bicubic").upper()]),
        image_mean=tuple(preprocessing.get("mean") or MEAN),
        image_std=tuple(preprocessing.get("std") or STD),
        **steps,
    )


def open_clip_tokenizer() -> CLIPTokenizer:
    """The tokenizer of CLIP from the vocabulary that the installed open_clip package contains.

    Raises CheckpointError if open_clip is not installed.
    """
    file = _package_folder("The tokenizer of this model") / VOCABULARY
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            merges = [line.strip() for line in islice(lines, 1, 1 + MERGES)]  # after a line with the version
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error}. {INSTALL}") from error
    symbols = list(bytes_to_unicode().values())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *(pair.replace(" ", "") for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*tokens, *SPECIAL_TOKENS])}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> CLIPModel:
    """Build a CLIPModel from an OpenCLIP configuration and state dict.

    name: Used in errors. Raises CheckpointError for another architecture.
    """
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    if isinstance(vision.get("layers"), (list, tuple)):
        raise CheckpointError(
            f"{name} has a ModifiedResNet as image tower (such as RN50), which transformers' CLIPModel does not have. "
            "Use an architecture with a vision transformer, such as ViT-B-32."
        )
    unknown = {key for key, value in vision.items() if value and key not in VISION | NO_EFFECT}
    unknown |= {key for key, value in text.items() if value and key not in TEXT | NO_EFFECT}
    if unknown:
        raise CheckpointError(
            f"{name} is not a plain CLIP model: its configuration sets {', '.join(sorted(unknown))}, which is not "
            "supported."
        )
    model = CLIPModel(_config(config, vision, text)).eval()
    renamed = _rename({key.removeprefix("text."): tensor.float() for key, tensor in tensors.items()})
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        raise CheckpointError(
            f"{name} is not a plain CLIP model: {len(missing)} tensors are missing and {len(unexpected)} are "
            f"unexpected, for example {(missing + unexpected)[0]}."
        )
    return model


def _check_preprocessing(preprocessing: Mapping[str, Any], image_size: int, name: str) -> None:
    """Raise CheckpointError if OpenCLIP prepares images for this model in a way that is not followed."""
    expected = PREPROCESSING | {"size": (image_size,)}
    for key, values in expected.items():
        given = preprocessing.get(key)
        if isinstance(given, (list, tuple)) and len(set(given)) == 1:
            given = given[0]
        if given is not None and given not in values:
            raise CheckpointError(
                f"{name} prepares images with {key} {given!r}, which is not supported, only "
                f"{' or '.join(map(repr, values))}."
            )


def _config(config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> CLIPConfig:
    """The transformers configuration. Defaults are those of open_clip's CLIPVisionCfg and CLIPTextCfg."""
    activation = {"hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu"}
    embedding = {"projection_dim": config["embed_dim"]}

    def tower(fields: Mapping[str, Any], width: int, heads: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": int(width * fields.get("mlp_ratio", 4.0)),
            "num_hidden_layers": fields.get("layers", 12),
            "num_attention_heads": heads,
        }

    vision_width, text_width = vision.get("width", 768), text.get("width", 512)
    return CLIPConfig(
        **embedding,
        text_config=tower(text, text_width, text.get("heads", 8))
        | activation
        | embedding
        | {
            "vocab_size": text.get("vocab_size", 49408),
            "max_position_embeddings": text.get("context_length", 77),
            "bos_token_id": text.get("vocab_size", 49408) - 2,
            "eos_token_id": text.get("vocab_size", 49408) - 1,  # the highest id; OpenCLIP pools there
            "pad_token_id": text.get("pad_id", 0),
        },
        vision_config=tower(vision, vision_width, vision_width // vision.get("head_width", 64))
        | activation
        | embedding
        | {"image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", 16)},
    )


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Map OpenCLIP's tensor names to those of transformers."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in RENAMED_TENSORS:
            # OpenCLIP stores projections for `x @ w`; a Linear computes `x @ w.T`.
            renamed[RENAMED_TENSORS[name]] = (
                tensor.T.contiguous() if name.endswith("proj") or "projection" in name else tensor
            )
        elif "resblocks." in name:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            layer, _, rest = name.partition("resblocks.")[2].partition(".")
            place = f"{tower}.encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, chunk in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                    renamed[f"{place}self_attn.{part}.{kind}"] = chunk.contiguous()
            else:
                renamed[place + _replace_prefix(rest, RENAMED_IN_LAYERS)] = tensor
        elif name != "attn_mask":  # the causal mask, which transformers computes itself
            renamed[_replace_prefix(name, RENAMED_NORMS)] = tensor
    return renamed


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _architecture(name: str) -> dict[str, Any]:
    """Configuration of an architecture, read from the installed open_clip without importing it (and torchvision)."""
    folder = _package_folder(f"The architecture {name}") / "model_configs"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("ViT-*.json")))
        raise CheckpointError(f"OpenCLIP has no architecture {name!r}. Supported ones are among: {known}.")
    return _json(file)


def _package_folder(what: str) -> Path:
    """Folder of the installed open_clip. Raises CheckpointError, which names `what` is missing, without it."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise CheckpointError(f"{what} is defined by open_clip, which is not installed. {INSTALL}")
    return Path(package.origin).parent


def _download(architecture: str, tag: str) -> tuple[dict[str, Any], Path]:
    """Metadata of published weights and their file, from OpenCLIP's cache or the hub."""
    try:
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
    except (ImportError, RuntimeError) as error:  # a torchvision that does not match raises either
        raise CheckpointError(
            f"{tag!r} is not a file, and open_clip cannot be imported ({error}). {INSTALL}"
        ) from error
    pretrained = get_pretrained_cfg(architecture, tag)
    if not pretrained:
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        raise CheckpointError(f"{tag!r} is neither a file nor a tag of {architecture}. Tags: {tags}.")
    try:
        return pretrained, Path(download_pretrained(pretrained))
    except Exception as error:  # the hub's client and the network raise many kinds
        raise CheckpointError(f"Cannot download {architecture}/{tag}: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = read_json(file, error=OptionError)
        content.get("model_cfg", content)["vision_cfg"], content.get("model_cfg", content)["text_cfg"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not the configuration of an OpenCLIP model: {error!r}") from error
    return content
