"""Saving a checkpoint: the new folder appears whole, and only then replaces the old one.

A checkpoint is written to a temporary folder next to its final path and renamed at the end. Whatever stops the process
in between, `path` holds either the old checkpoint or the new one, or `recover_interrupted_save` restores it
(`files.replacement_folder`).
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, SiglipModel
from transformers.convert_slow_tokenizer import convert_slow_tokenizer

from unidiff_sdk._internal.files import recover_folder, replacement_folder
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.schedule import stated_settings

from .checkpoint import METADATA
from .encoders.search_model import SearchModel
from .json_files import read_json, write_json
from .loading.second_text_encoder import SecondTextEncoder, ThirdTextEncoder
from .loading.weight_files import DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS
from .model_card import MODEL_CARD, model_card
from .text_sharing import tower_of

__all__ = [
    "TRAINING_STATE",
    "merged_state_dict",
    "plain_state_dict",
    "recover_interrupted_save",
    "require_replaceable",
    "save_checkpoint",
    "save_scheduler",
    "save_search_model",
]

TRAINING_STATE = "training_state"  # subfolder with the state of an unfinished run
TEXT_PREFIX = "text_model."
TIED_EMBEDDING = "encoder.embed_tokens.weight"  # of a T5; its file holds the tensor once, as shared.weight
SECOND_INDEX: dict[str, Any] = {
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}
ABSENT_THIRD = ["text_encoder_3", "tokenizer_3"]
SIGLIP_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


def save_checkpoint(
    path: str | Path,
    *,
    unet: UNet2DConditionModel | SD3Transformer2DModel,
    vae: AutoencoderKL,
    clip: CLIPModel,
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
    clip_tokenizer: CLIPTokenizer | None = None,
    scheduler: Any,
    image_processor: Any,
    second: SecondTextEncoder | None = None,
    third: ThirdTextEncoder | None = None,
    meta: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    keep: int = 1,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint folder with its model card. A previous one at `path` is replaced once the new one is complete.

    Low-rank adapters are merged into the weights that they adapt. The models themselves stay unchanged.

    Args:
        path: Folder to write.
        unet: UNet; the transformer of Stable Diffusion 3.
        clip_tokenizer: Tokenizer of CLIP. Default: `tokenizer`.
        second: Second text encoder, of Stable Diffusion XL and 3.
        third: Third text encoder, of Stable Diffusion 3.
        meta: Provenance, JSON-serializable. Written to unidiff.json and shown in the model card (README.md).
        dtype: Precision of the stored weights; torch.float16 halves the size. Default: as in memory.
        keep: Number of checkpoints to keep. Older ones move to `path`.history/.
        write_more: Writes further files into the temporary folder before it is renamed.

    Returns:
        `path`.

    Raises:
        CheckpointError: `path` holds something that is not a checkpoint, or a file cannot be written.
    """

    is_transformer = isinstance(unet, SD3Transformer2DModel)
    pipeline, index = _transformer_index(third) if is_transformer else _unet_index(second)
    # Parts that diffusers demands, or to be told that there are none.
    absent = {"absent": ABSENT_THIRD} if is_transformer and third is None else {}

    def write_parts(folder: Path) -> None:
        _save_diffusers(unet, folder / ("transformer" if is_transformer else "unet"), dtype)
        _save_diffusers(vae, folder / "vae", dtype)
        _save_clip(clip, folder / "clip", dtype)
        _save_text_encoder(text_encoder, folder / "text_encoder", dtype)
        _save_tokenizer(tokenizer, folder / "tokenizer")
        if second:
            _save_text_encoder(second.model, folder / "text_encoder_2", dtype)
            _save_tokenizer(second.tokenizer, folder / "tokenizer_2")
        if third:
            _save_third(third, folder, dtype)
        _save_tokenizer(clip_tokenizer or tokenizer, folder / "clip")
        image_processor.save_pretrained(folder / "clip")
        save_scheduler(scheduler, folder / "scheduler")
        write_json(folder / "model_index.json", {"_class_name": pipeline} | index | _parts_index(scheduler))

    content = {"format": "unidiff-checkpoint", "pipeline": pipeline, **absent, **meta}
    return _replace(Path(path), content, write_parts, keep, write_more)


def save_search_model(
    path: str | Path,
    model: SearchModel,
    *,
    meta: Mapping[str, Any],
    keep: int = 1,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Write encoders without a generator as a folder of transformers, with a model card. See `save_checkpoint`.

    Raises CheckpointError if `path` holds something that is not a checkpoint, or a file cannot be written.
    """

    def write_parts(folder: Path) -> None:
        _save_clip(model.model, folder, None)
        model.image_processor.save_pretrained(folder)
        if model.is_siglip and model.folder is not None:  # training never changes the tokenizer
            for name in SIGLIP_TOKENIZER_FILES:
                if (model.folder / name).is_file():
                    shutil.copyfile(model.folder / name, folder / name)
        else:
            _save_tokenizer(model.tokenizer, folder)

    return _replace(Path(path), {"format": "unidiff-encoders"} | dict(meta), write_parts, keep, write_more)


def _replace(
    path: Path,
    meta: Mapping[str, Any],
    write_parts: Callable[[Path], None],
    keep: int,
    write_more: Callable[[Path], None] | None,
) -> Path:
    """Write a checkpoint folder with its metadata and model card, in place of a previous one."""
    require_replaceable(path)
    content = {"schema_version": 1, **meta}
    try:
        with replacement_folder(path, CheckpointError, retire=partial(_retire, path=path, keep=keep)) as temporary:
            write_parts(temporary)
            (temporary / MODEL_CARD).write_text(model_card(content), encoding="utf-8")
            if write_more:
                write_more(temporary)
            write_json(temporary / METADATA, content)
            _follow_umask(temporary)
    except (OSError, SafetensorError) as error:  # safetensors wraps errors of the disk
        raise CheckpointError(f"Cannot save the checkpoint {path}: {error}. The previous one is unchanged.") from error
    return path


def require_replaceable(path: Path, *, overwrite: bool = True) -> None:
    """Check that a checkpoint can be saved at `path`. Call it before long work.

    Raises:
        CheckpointError: `path` holds something that is not a checkpoint; or, without `overwrite`, a checkpoint.
    """
    if not overwrite and (path / METADATA).is_file():
        raise CheckpointError(f"{path} already holds a checkpoint. Name another folder, or replace it: --overwrite.")
    is_empty_folder = path.is_dir() and not any(path.iterdir())
    if path.exists() and not ((path / METADATA).is_file() or is_empty_folder):
        raise CheckpointError(f"{path} exists and is not a checkpoint. Name a new folder, or remove it first.")


def recover_interrupted_save(path: Path) -> None:
    """Remove what a process that was killed while saving at `path` left, and restore the checkpoint it had set aside.

    Folders of processes that still run are left alone.
    """
    recover_folder(path)


# --- models and tokenizers -------------------------------------------------------------------------------------------


def _save_diffusers(model: Any, folder: Path, dtype: torch.dtype | None) -> None:
    model.save_config(folder)
    _remove_source_paths(folder / "config.json")
    _save_tensors(merged_state_dict(model), folder / DIFFUSERS_WEIGHTS, dtype)


def _save_clip(clip: CLIPModel | SiglipModel, folder: Path, dtype: torch.dtype | None) -> None:
    _save_transformers_config(clip, folder)
    _save_tensors(merged_state_dict(clip), folder / TRANSFORMERS_WEIGHTS, dtype)


def _save_text_encoder(
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection, folder: Path, dtype: torch.dtype | None
) -> None:
    _save_transformers_config(text_encoder, folder)
    if isinstance(text_encoder, CLIPTextModelWithProjection):
        _save_tensors(merged_state_dict(text_encoder), folder / TRANSFORMERS_WEIGHTS, dtype)
        return
    # transformers 5 drops this prefix when it saves. 4.57 then loads random weights. Both read prefixed names.
    prefixed = {TEXT_PREFIX + name: tensor for name, tensor in merged_state_dict(tower_of(text_encoder)).items()}
    _save_tensors(prefixed, folder / TRANSFORMERS_WEIGHTS, dtype)


def _save_third(third: ThirdTextEncoder, folder: Path, dtype: torch.dtype | None) -> None:
    _save_transformers_config(third.model, folder / "text_encoder_3")
    tensors = {name: t for name, t in plain_state_dict(third.model).items() if name != TIED_EMBEDDING}
    _save_tensors(tensors, folder / "text_encoder_3" / TRANSFORMERS_WEIGHTS, dtype)
    third.tokenizer.save_pretrained(folder / "tokenizer_3")
    _remove_source_paths(folder / "tokenizer_3" / "tokenizer_config.json")


def _save_transformers_config(model: Any, folder: Path) -> None:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # transformers 5 loads in the dtype of the config. A pipeline stored in half precision would mix half and float.
    config.dtype = torch.float32
    config.save_pretrained(folder)


def _save_tensors(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, file, metadata={"format": "pt"})


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """State dict of `model` with its low-rank adapters (peft) added to the adapted weights: W + ΔW.

    The names are those of a model without adapters. The model itself stays unchanged, so training can continue.
    """
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in plain_state_dict(model).items()
        if ".lora_" not in name
    }
    for name, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            tensors[f"{name}.weight"] = layer.base_layer.weight + delta
    return tensors


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without hooks: those of sharded blocks would exchange whole weights for the share of a process."""
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        module._save_to_state_dict(tensors, f"{name}." if name else "", keep_vars=False)
    return tensors


def _follow_umask(folder: Path) -> None:
    """Give all files of a new checkpoint the mode of its metadata: those of safetensors are private."""
    mode = (folder / METADATA).stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(stat.S_IMODE(mode))


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json for the runtime and transformers 5, vocab.json and merges.txt for transformers 4."""
    tokenizer.save_pretrained(folder)
    _remove_source_paths(folder / "tokenizer_config.json")
    backend = getattr(tokenizer, "backend_tokenizer", None) or convert_slow_tokenizer(tokenizer)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))


def _unet_index(second: SecondTextEncoder | None) -> tuple[str, dict[str, Any]]:
    """The pipeline of diffusers that loads a checkpoint with a UNet, and what only its index holds."""
    own: dict[str, Any] = {
        "text_encoder": ["transformers", "CLIPTextModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    if second is None:
        return "StableDiffusionPipeline", own | {"requires_safety_checker": False, "safety_checker": [None, None]}
    return "StableDiffusionXLPipeline", own | SECOND_INDEX | {"force_zeros_for_empty_prompt": second.zero_negative}


def _transformer_index(third: ThirdTextEncoder | None) -> tuple[str, dict[str, Any]]:
    """The same of a checkpoint with a transformer."""
    return "StableDiffusion3Pipeline", SECOND_INDEX | {
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"] if third else [None, None],
        "tokenizer_3": ["transformers", type(third.tokenizer).__name__] if third else [None, None],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
    }


def _parts_index(scheduler: Any) -> dict[str, Any]:
    """What the index of every pipeline holds."""
    return {
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _remove_source_paths(file: Path) -> None:
    """Remove the path that a library records for the folder it read. It means nothing on another machine."""
    content = read_json(file)
    for key in ("_name_or_path", "is_local", "local_files_only"):
        content.pop(key, None)
    write_json(file, content)


def save_scheduler(scheduler: Any, folder: Path) -> None:
    """Write a scheduler's configuration without the sampler settings that its own file left out.

    diffusers writes the defaults of the class as if they were stated. Another scheduler class, which has other
    defaults, would then take them over.
    """
    scheduler.save_pretrained(folder)
    file = folder / "scheduler_config.json"
    content, stated = read_json(file), stated_settings(scheduler.config)
    write_json(file, {key: value for key, value in content.items() if key[0] == "_" or key in stated})


# --- replacing the previous checkpoint -------------------------------------------------------------------------------


def _retire(replaced: Path, path: Path, keep: int) -> None:
    """Move a replaced checkpoint to the history, which holds at most keep - 1, or remove it."""
    history = path.with_name(f"{path.name}.history")
    if keep > 1 and (replaced / METADATA).is_file():
        history.mkdir(exist_ok=True)
        shutil.rmtree(replaced / TRAINING_STATE, ignore_errors=True)  # only the latest checkpoint can be resumed
        kept = history / f"step-{read_json(replaced / METADATA).get('step', 0):06d}"
        shutil.rmtree(kept, ignore_errors=True)
        replaced.rename(kept)
    shutil.rmtree(replaced, ignore_errors=True)
    if history.is_dir():
        by_age = sorted(history.glob("step-*"), key=lambda folder: folder.stat().st_mtime_ns)
        for folder in by_age[: len(by_age) - (keep - 1)]:
            shutil.rmtree(folder, ignore_errors=True)
