"""OpenCLIP models as transformers' `CLIPModel`: the same architecture under other names.

Named `open_clip:ARCH/TAG` (downloaded by the open_clip package), `open_clip:ARCH/FILE.safetensors`, or
`open_clip:FOLDER` with open_clip_config.json and open_clip_model.safetensors, as the Hugging Face hub has them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from unidiff_sdk.errors import CheckpointError

__all__ = ["PREFIX", "OpenClip", "convert", "load_open_clip"]

PREFIX = "open_clip:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
INSTALL = "pip install open_clip_torch, in an environment whose torchvision matches its torch"
# What a configuration may say and CLIPModel can do; anything else is another architecture.
VISION = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio", "pad_id", "eos_id"}
NO_CHANGE = {"patch_dropout", "output_tokens", "tokenizer_kwargs", "hf_tokenizer_name", "tokenizer_mode"}
# Mean and deviation of the RGB channels that OpenAI trained CLIP with, and OpenCLIP's default.
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class OpenClip:
    """A converted model, and how it takes pictures: `image_size` pixels a side, RGB normalized by mean and std."""

    clip: CLIPModel
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_open_clip(name: str) -> OpenClip:
    """Open what `name` (see above) names. Raises CheckpointError where it is missing or of another architecture."""
    spec = name.removeprefix(PREFIX)
    architecture, _, which = spec.partition("/")
    preprocessing: Mapping[str, Any] = {}
    if (Path(spec) / CONFIG).is_file():
        content = _json(Path(spec) / CONFIG)
        config, preprocessing, file = content["model_cfg"], content.get("preprocess_cfg", {}), Path(spec) / WEIGHTS
    elif architecture and which:
        config, file = _architecture(architecture), Path(which)
        if not file.exists():
            pretrained, file = _download(architecture, which)
            config = config | {"quick_gelu": config.get("quick_gelu", False) or pretrained.get("quick_gelu", False)}
            preprocessing = pretrained
    else:
        raise CheckpointError(f"{name!r} is neither {PREFIX}ARCHITECTURE/TAG-or-file nor {PREFIX}FOLDER with {CONFIG}")
    if file.suffix != ".safetensors":
        raise CheckpointError(f"{file} is no safetensors file, and nothing else is read: convert it first")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    clip = convert(config, tensors, name)
    mean, std = (tuple(preprocessing.get(key) or default) for key, default in (("mean", MEAN), ("std", STD)))
    return OpenClip(clip, int(clip.config.vision_config.image_size), mean, std)


def convert(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> CLIPModel:
    """CLIPModel of an OpenCLIP configuration and state dict. Raises CheckpointError for another architecture."""
    vision, text = dict(config["vision_cfg"]), dict(config["text_cfg"])
    unknown = {key for key, value in vision.items() if value and key not in VISION | NO_CHANGE}
    unknown |= {key for key, value in text.items() if value and key not in TEXT | NO_CHANGE}
    if unknown:
        raise CheckpointError(f"{name} is not of CLIP's own architecture: it has {', '.join(sorted(unknown))}")
    model = CLIPModel(_config(config, vision, text)).eval()
    renamed = _rename({key.removeprefix("text."): tensor.float() for key, tensor in tensors.items()})
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [key for key in missing if not key.endswith("position_ids")]
    if missing or unexpected:
        raise CheckpointError(
            f"{name} is not of CLIP's own architecture: {len(missing)} tensors are missing and {len(unexpected)} "
            f"have no place, among them {(missing + unexpected)[0]}"
        )
    return model


def _config(config: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> CLIPConfig:
    """The fields as open_clip's CLIPVisionCfg and CLIPTextCfg have them, with their defaults."""
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
            "eos_token_id": text.get("vocab_size", 49408) - 1,  # the highest id, at which OpenCLIP pools
            "pad_token_id": text.get("pad_id", 0),
        },
        vision_config=tower(vision, vision_width, vision_width // vision.get("head_width", 64))
        | activation
        | embedding
        | {"image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", 16)},
    )


def _rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names to those of transformers."""
    outer = {
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.proj": "visual_projection.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "text_projection": "text_projection.weight",
        "logit_scale": "logit_scale",
    }
    norms = {  # "pre_layrnorm" is how transformers spells it
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "ln_final.": "text_model.final_layer_norm.",
    }
    inner = {
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "attn.out_proj.": "self_attn.out_proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    }
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in outer:
            # Projections are stored for `x @ w`, a Linear computes `x @ w.T`.
            renamed[outer[name]] = tensor.T.contiguous() if name.endswith("proj") or "projection" in name else tensor
        elif "resblocks." in name:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            layer, _, rest = name.partition("resblocks.")[2].partition(".")
            place = f"{tower}.encoder.layers.{layer}."
            if rest.startswith("attn.in_proj_"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, chunk in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                    renamed[f"{place}self_attn.{part}.{kind}"] = chunk.contiguous()
            else:
                renamed[place + _replace_prefix(rest, inner)] = tensor
        elif name != "attn_mask":  # a causal mask, which transformers makes when it needs it
            renamed[_replace_prefix(name, norms)] = tensor
    return renamed


def _replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name


def _architecture(name: str) -> dict[str, Any]:
    """The configuration of an architecture, read from the installed package without importing it (and torchvision)."""
    package = find_spec("open_clip")
    if package is None or package.origin is None:
        raise CheckpointError(f"architectures of OpenCLIP are known only where it is installed: {INSTALL}")
    folder = Path(package.origin).parent / "model_configs"
    file = folder / f"{name}.json"
    if not file.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("ViT-*.json")))
        raise CheckpointError(f"OpenCLIP has no architecture {name!r}; those of CLIP's own kind are among {known}")
    return _json(file)


def _download(architecture: str, tag: str) -> tuple[dict[str, Any], Path]:
    """What OpenCLIP knows of published weights, and the file, from its cache or the hub."""
    try:
        from open_clip.pretrained import download_pretrained, get_pretrained_cfg, list_pretrained_tags_by_model
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises either
        raise CheckpointError(f"{tag!r} is no file, and open_clip cannot be imported ({error}): {INSTALL}") from error
    pretrained = get_pretrained_cfg(architecture, tag)
    if not pretrained:
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        raise CheckpointError(f"{tag!r} is neither a file nor a tag of {architecture}; its tags are {tags}")
    try:
        return pretrained, Path(download_pretrained(pretrained))
    except Exception as error:  # whatever the hub's client and the network raise
        raise CheckpointError(f"cannot download {architecture}/{tag}: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        content.get("model_cfg", content)["vision_cfg"], content.get("model_cfg", content)["text_cfg"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} configures no OpenCLIP model with two towers: {error!r}") from error
    return content
