"""Stable Diffusion 3 and 3.5: which folders of a pipeline are supported, checked before any weight is read.

They have a transformer instead of a UNet, two CLIP text towers with projections, and a VAE with a shift. Optional is a
third text encoder, a T5.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff_sdk._internal.json_values import number_within
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.errors import BundleError, CheckpointError
from unidiff_sdk.inference.schedule import FlowSchedule

from .architectures import check_classes, check_tokenizer, require_files
from .json_files import read_json
from .loading.options import BaseOptions

__all__ = [
    "THIRD",
    "check_stable_diffusion_3",
    "is_stable_diffusion_3",
    "refuse_textual_inversions",
    "transformer_refusal",
]

PIPELINES = tuple(f"StableDiffusion3{task}Pipeline" for task in ("", "Img2Img", "Inpaint"))
ADVICE = "use a model with the architecture of Stable Diffusion 3 or 3.5"
THIRD = "text_encoder_3"
FILES = {
    "transformer/config.json": "transformer",
    "vae/config.json": "VAE",
    "text_encoder/config.json": "first text encoder",
    "text_encoder_2/config.json": "second text encoder",
    "tokenizer/tokenizer_config.json": "tokenizer of the first text encoder",
    "tokenizer_2/tokenizer_config.json": "tokenizer of the second text encoder",
    "scheduler/scheduler_config.json": "scheduler",
}
CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "transformer/config.json": ("_class_name", ("SD3Transformer2DModel",)),
    "vae/config.json": ("_class_name", ("AutoencoderKL",)),
    "text_encoder/config.json": ("model_type", ("clip_text_model",)),
    "text_encoder_2/config.json": ("model_type", ("clip_text_model",)),
    "tokenizer/tokenizer_config.json": ("tokenizer_class", CLIP_TOKENIZERS),
    "tokenizer_2/tokenizer_config.json": ("tokenizer_class", CLIP_TOKENIZERS),
}
THIRD_FILES = {
    "text_encoder_3/config.json": "third text encoder",
    "tokenizer_3/tokenizer.json": "tokenizer of the third text encoder",
    "tokenizer_3/tokenizer_config.json": "tokenizer of the third text encoder",
}
THIRD_CLASSES: dict[str, tuple[str, tuple[str, ...]]] = {
    "text_encoder_3/config.json": ("model_type", ("t5",)),
    "tokenizer_3/tokenizer_config.json": ("tokenizer_class", ("T5Tokenizer", "T5TokenizerFast")),
}
LARGEST = 65_536  # of the sizes in the configuration of a transformer
# With the defaults of diffusers' class.
SIZES = {
    "attention_head_dim": 64,
    "caption_projection_dim": 1152,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "num_attention_heads": 18,
    "patch_size": 2,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 96,
    "sample_size": 128,
}


def is_stable_diffusion_3(folder: Path) -> bool:
    """Whether the index of a pipeline folder names Stable Diffusion 3.

    Raises:
        CheckpointError: it is another pipeline with a transformer.
    """
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    if name not in PIPELINES and (folder / "transformer").is_dir():
        raise CheckpointError(
            f"{folder} is {name!r:.60}. Of the pipelines with a transformer, only {', '.join(PIPELINES)} are supported."
        )
    return name in PIPELINES


def check_stable_diffusion_3(folder: Path) -> None:
    """Check the configuration files of a pipeline folder. Raises CheckpointError if it is another or incomplete."""
    require_files(folder, FILES)
    check_classes(folder, CLASSES, ADVICE)
    transformer, vae, text, second = (
        read_json(folder / part / "config.json") for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    if refused := transformer_refusal(transformer, vae, text, second):
        raise CheckpointError(f"{folder}: {refused}")
    try:
        FlowSchedule.from_config(read_json(folder / "scheduler" / "scheduler_config.json"))
    except BundleError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    positions = text.get("max_position_embeddings", 77)
    if (other := second.get("max_position_embeddings", 77)) != positions:
        raise CheckpointError(f"{folder}: text_encoder/ has {positions} positions, but text_encoder_2/ has {other}.")
    for name in ("tokenizer", "tokenizer_2"):
        check_tokenizer(folder / name, positions)
    _check_third(folder, transformer.get("joint_attention_dim", SIZES["joint_attention_dim"]))


def _check_third(folder: Path, width: int) -> None:
    """Check a third text encoder; warn if the pipeline names one that is not in its folder."""
    if (folder / THIRD).is_dir():
        require_files(folder, THIRD_FILES)
        check_classes(folder, THIRD_CLASSES, ADVICE)
        if (returned := read_json(folder / THIRD / "config.json").get("d_model", 512)) != width:
            raise CheckpointError(
                f"{folder}: the transformer takes token states of width {width}, but {THIRD}/ returns {returned}: they "
                "belong to different models"
            )
    elif any(read_json(folder / "model_index.json").get(THIRD) or ()):
        warn(
            f"{folder} has no {THIRD}/, which its model_index.json names. Zeros stand for its states, as in diffusers "
            "with text_encoder_3=None"
        )


def refuse_textual_inversions(folder: Path, options: BaseOptions) -> None:
    """Raise CheckpointError for textual inversions, which diffusers does not load into these models."""
    if options.textual_inversions:
        raise CheckpointError(
            f"Textual inversions are not supported for Stable Diffusion 3 ({folder}): diffusers does not load them. "
            "Leave them out."
        )


def transformer_refusal(
    transformer: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any], second: Mapping[str, Any]
) -> str | None:
    """Why a transformer is not supported with this VAE and these text encoders, by the configurations. None if so.

    Raises:
        CheckpointError: a size of the transformer is not a number that a model can have.
    """
    sizes = {}
    for name, default in SIZES.items():
        value = number_within(name, transformer.get(name, default), 1, LARGEST, CheckpointError, whole=True)
        sizes[name] = int(value)
    returned = transformer.get("out_channels") or sizes["in_channels"]
    return (
        _shape_refusal(sizes)
        or _vae_refusal(sizes["in_channels"], returned, vae)
        or _width_refusal("token states", sizes["joint_attention_dim"], "hidden_size", text, second, padded=True)
        or _width_refusal("pooled embeddings", sizes["pooled_projection_dim"], "projection_dim", text, second)
    )


def _shape_refusal(sizes: Mapping[str, int]) -> str | None:
    heads, width, embedded = (
        sizes[name] for name in ("num_attention_heads", "attention_head_dim", "caption_projection_dim")
    )
    if embedded != heads * width:
        return f"caption_projection_dim of the transformer is {embedded}, but it has {heads} heads of width {width}"
    patch, side, most = sizes["patch_size"], sizes["sample_size"], sizes["pos_embed_max_size"]
    if side % patch or side // patch > most:
        return f"sample_size {side} of the transformer is not divided by patch_size {patch} into at most {most} patches"
    return None


def _vae_refusal(channels: int, returned: Any, vae: Mapping[str, Any]) -> str | None:
    latents = vae.get("latent_channels")
    if not channels == latents == returned:
        return f"the transformer takes {channels} channels and returns {returned}, but the VAE has {latents}; {ADVICE}"
    for name in ("scaling_factor", "shift_factor"):
        value = vae.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"{name} of the VAE is {value!r:.60}, but it must be a number; {ADVICE}"
    if stated := [name for name in ("latents_mean", "latents_std") if vae.get(name) is not None]:
        return f"the VAE states {stated[0]}, which diffusers' pipeline does not apply; {ADVICE}"
    return None


def _width_refusal(
    kind: str, taken: int, name: str, text: Mapping[str, Any], second: Mapping[str, Any], *, padded: bool = False
) -> str | None:
    """padded: Whether what the text encoders return may be narrower than what the transformer takes."""
    widths = [text.get(name), second.get(name)]
    known = [width for width in widths if isinstance(width, int)]
    if len(known) < len(widths) or sum(known) == taken or (padded and sum(known) < taken):
        return None
    return (
        f"the transformer takes {kind} of width {taken}, but the text encoders return {widths[0]} and {widths[1]}: "
        "they belong to different models"
    )
