"""Checkpoints: a Stable Diffusion pipeline folder with its CLIP beside it, which diffusers and transformers open as is.

    model_index.json  unet/ vae/ text_encoder/ tokenizer/ scheduler/    what StableDiffusionPipeline reads
    clip/                                                               what CLIPModel reads
    unidiff.json                                                        where it comes from: config, metrics, data

Only safetensors are read and written, nothing is ever unpickled or downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import convert_slow_tokenizer
from transformers.utils import logging as transformers_logging

from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.diffusers_folder import refusal

from .merging import merged_state_dict

__all__ = [
    "TINY",
    "TRAINING_STATE",
    "Checkpoint",
    "assemble",
    "load_checkpoint",
    "load_clip",
    "recover",
    "require_replaceable",
    "require_supported",
    "save_checkpoint",
    "share_text_layers",
]

TINY = Path(__file__).parents[1] / "recipes" / "tiny_checkpoint"

PIPELINE_PARTS = {
    "model_index.json": "the diffusers pipeline index",
    "unet/config.json": "the UNet",
    "vae/config.json": "the VAE",
    "text_encoder/config.json": "the pipeline's text encoder",
    "tokenizer/tokenizer_config.json": "the tokenizer",
    "scheduler/scheduler_config.json": "the noise scheduler",
}
CLIP_PARTS = {
    "clip/config.json": "the CLIP model",
    "clip/preprocessor_config.json": "CLIP's preprocessing",
}
DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS = "diffusion_pytorch_model.safetensors", "model.safetensors"
TEXT_PREFIX = "text_model."
TRAINING_STATE = "training_state"  # what an unfinished run keeps in its checkpoint's folder

# transformers 5 names its torchvision-free image processor differently; 4.57 has only the one.
ImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one model, on the CPU, in float32 and in eval mode.

    Where `shared` is true, `text_encoder` is the very tower of `clip` (the same parameters), so that training either
    trains both.
    """

    path: Path
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    clip: CLIPModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    clip_tokenizer: CLIPTokenizer
    scheduler: Any
    image_processor: Any
    meta: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> dict[str, Any]:
        """All that `save_checkpoint` writes, but for `meta`, by its names."""
        names = ("unet", "vae", "clip", "text_encoder", "tokenizer", "clip_tokenizer", "scheduler", "image_processor")
        return {name: getattr(self, name) for name in names}

    @property
    def shared(self) -> bool:
        """Whether the pipeline's text encoder and CLIP's text tower are the same parameters."""
        return _tower(self.text_encoder) is _tower(self.clip.text_model)

    @property
    def shared_layers(self) -> int:
        """How many of the text encoder's layers, from the first, are layers of CLIP's text tower."""
        return sum(a is b for a, b in zip(_layers(self.text_encoder), _layers(self.clip.text_model), strict=False))

    @property
    def conditioning_layer(self) -> int | None:
        """Which layer of CLIP's text tower conditions the UNet, from the end: -1 the last (SD 1.x), -2 the one before
        (SD 2.x). None where the text encoder has layers, or a final norm, of its own."""
        if self.shared:
            return -1
        ours, theirs = _tower(self.text_encoder), _tower(self.clip.text_model)
        if self.shared_layers < len(_layers(ours)) or ours.final_layer_norm is not theirs.final_layer_norm:
            return None
        return self.shared_layers - len(_layers(theirs)) - 1

    def describe_sharing(self) -> str:
        """One line on what the UNet's text encoder and CLIP's text tower have in common."""
        ours, theirs = len(_layers(self.text_encoder)), len(_layers(self.clip.text_model))
        if not self.shared_layers:
            return "text encoder and CLIP have no layer in common: both are kept, and only pixels couple them"
        common = f"{self.shared_layers} of the text encoder's {ours} layers are CLIP's ({theirs})"
        if self.conditioning_layer is None:
            return f"{common}: both halves teach those, the others are kept apart"
        which = {-1: "the last", -2: "the last but one"}.get(
            self.conditioning_layer, f"{-self.conditioning_layer}. last"
        )
        return f"{common}: both halves teach them, and {which} conditions the UNet"

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square pictures that the UNet and VAE make."""
        return int(self.unet.config.sample_size) * self.latent_factor

    @property
    def fit(self) -> Fit:
        """How its pictures were made square in training: "crop", or "pad" where its record says so."""
        return "pad" if self.meta.get("fit") == "pad" else "crop"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint folder, or the built-in base by the name "tiny".

    Always float32, whatever was stored. Raises CheckpointError where a part is missing, unreadable, or incomplete.
    """
    folder = TINY if str(path) == "tiny" else Path(path)
    _require_parts(folder, PIPELINE_PARTS | CLIP_PARTS, named_tiny=str(path) == "tiny")
    clip, image_processor = load_clip(folder / "clip")
    return assemble(folder, clip, image_processor, _read_clip_tokenizer(folder / "clip"))


def load_clip(folder: Path) -> tuple[CLIPModel, Any]:
    """A transformers CLIP folder: the model, float32 in eval mode, and its image processor. Raises CheckpointError."""
    _require_parts(folder, {"config.json": "the model", "preprocessor_config.json": "its preprocessing"})
    with _quiet():
        return _load(CLIPModel, folder), _read(ImageProcessor, folder)


def assemble(
    folder: Path, clip: CLIPModel, image_processor: Any, clip_tokenizer: CLIPTokenizer | None = None
) -> Checkpoint:
    """The Stable Diffusion pipeline in `folder` with this CLIP beside it, sharing the text layers that both have.

    clip_tokenizer: default: the pipeline's. Raises CheckpointError where a part is missing, unreadable, or incomplete.
    """
    _require_parts(folder, PIPELINE_PARTS)
    with _quiet():
        tokenizer = _read(CLIPTokenizer, folder / "tokenizer")
        return Checkpoint(
            path=folder,
            unet=_load(UNet2DConditionModel, folder / "unet"),
            vae=_load(AutoencoderKL, folder / "vae"),
            clip=clip,
            text_encoder=share_text_layers(_load(CLIPTextModel, folder / "text_encoder"), clip),
            tokenizer=tokenizer,
            clip_tokenizer=clip_tokenizer or tokenizer,
            scheduler=_read(_scheduler_class(folder), folder / "scheduler"),
            image_processor=image_processor,
            meta=_json(folder / "unidiff.json") if (folder / "unidiff.json").exists() else {},
        )


def save_checkpoint(
    path: str | Path,
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    clip: CLIPModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    clip_tokenizer: CLIPTokenizer | None = None,
    scheduler: Any,
    image_processor: Any,
    meta: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    keep: int = 1,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint folder; an older checkpoint at `path` is replaced only once the new one is complete.

    clip_tokenizer: CLIP's own; default: `tokenizer`. dtype: what the weights are stored as (torch.float16 halves the
    size); default: as they are. meta: JSON-serialisable, goes to unidiff.json. keep: how many checkpoints remain; older
    ones than `path` lie beside it in `path`.history/. also: writes more into the new folder before it appears. Low-rank
    adapters are merged into the weights that they adapt. Returns `path`.
    Raises CheckpointError where `path` holds something that is not a checkpoint, or the disk refuses.
    """
    path = Path(path)
    require_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, model in {"unet": unet, "vae": vae}.items():
            model.save_config(temporary / name)
            _forget_origin(temporary / name / "config.json")
            _save_tensors(merged_state_dict(model), temporary / name / DIFFUSERS_WEIGHTS, dtype)
        _save_transformer(clip, merged_state_dict(clip), temporary / "clip", dtype)
        # transformers 5 drops this prefix when it saves, and 4.57 then loads random weights; both read it.
        prefixed = {TEXT_PREFIX + name: tensor for name, tensor in merged_state_dict(_tower(text_encoder)).items()}
        _save_transformer(text_encoder, prefixed, temporary / "text_encoder", dtype)
        _save_tokenizer(tokenizer, temporary / "tokenizer")
        _save_tokenizer(clip_tokenizer or tokenizer, temporary / "clip")
        image_processor.save_pretrained(temporary / "clip")
        scheduler.save_pretrained(temporary / "scheduler")
        _write_json(temporary / "model_index.json", _model_index(scheduler))
        if also:
            also(temporary)
        _write_json(temporary / "unidiff.json", {"format": "unidiff-checkpoint", "schema_version": 1, **meta})
        _move_into_place(temporary, path, keep)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the disk says
        raise CheckpointError(
            f"cannot save the checkpoint {path}: {error}. What was there before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def require_replaceable(path: Path) -> None:
    """Refuse to save where something else than a checkpoint stands. To be asked before the work whose result it is."""
    if path.exists() and not ((path / "unidiff.json").is_file() or _is_empty_folder(path)):
        raise CheckpointError(f"{path} exists and is not a checkpoint: name a new folder, or remove it first")


# --- reading ---------------------------------------------------------------------------------------------------------


def _require_parts(folder: Path, parts: Mapping[str, str], *, named_tiny: bool = False) -> None:
    if not folder.is_dir():
        hint = "it comes with a source checkout, not with the wheel" if named_tiny else "name an existing folder"
        raise CheckpointError(f"no checkpoint at {folder}: {hint}")
    missing = [f"{name} ({what})" for name, what in parts.items() if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} is not a complete checkpoint, it lacks {', '.join(missing)}")


def _read_clip_tokenizer(folder: Path) -> CLIPTokenizer | None:
    """CLIP's own tokenizer, where its folder has one."""
    return _read(CLIPTokenizer, folder) if (folder / "tokenizer_config.json").is_file() else None


def _load(model_class: Any, folder: Path) -> Any:
    """A model from its folder in float32, with every one of its tensors read from the file."""
    weights = DIFFUSERS_WEIGHTS if issubclass(model_class, diffusers.ModelMixin) else TRANSFORMERS_WEIGHTS
    if not (folder / weights).is_file() and not (folder / f"{weights}.index.json").is_file():
        raise CheckpointError(f"{folder} lacks {weights}: only safetensors are read, convert other formats first")
    model, info = _read(model_class, folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    # The libraries only warn and leave such tensors random: a model that looks loaded and is not.
    missing = [name for name in info["missing_keys"] if not name.endswith("position_ids")]
    if missing or info.get("mismatched_keys"):
        wrong = [*missing, *map(str, info.get("mismatched_keys", []))]
        raise CheckpointError(f"{folder} lacks or misshapes {len(wrong)} tensors of its model, among them {wrong[0]}")
    return model.eval()


def _read(anything: Any, folder: Path, **options: Any) -> Any:
    try:
        return anything.from_pretrained(folder, local_files_only=True, **options)
    except CheckpointError:
        raise
    except Exception as error:  # the libraries raise whatever their parsers raise
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot read {folder} as {anything.__name__}: {first_line}") from error


def _scheduler_class(folder: Path) -> Any:
    name = _json(folder / "scheduler" / "scheduler_config.json").get("_class_name", "")
    scheduler_class = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if scheduler_class is None:
        raise CheckpointError(
            f"{folder / 'scheduler'} names {name!r}, which is no scheduler of the installed diffusers"
        )
    return scheduler_class


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content


def _tower(text_model: nn.Module) -> Any:
    """The transformer itself: up to transformers 4.57, CLIPTextModel wraps it once more as `.text_model`."""
    return getattr(text_model, "text_model", text_model)


def _layers(text_model: nn.Module) -> nn.ModuleList:
    layers: nn.ModuleList = _tower(text_model).encoder.layers
    return layers


def share_text_layers(text_encoder: CLIPTextModel, clip: CLIPModel) -> CLIPTextModel:
    """The text encoder on the parameters of CLIP's text tower, as far as both are equal from the input up.

    Found by the longest common prefix: the embeddings, then layer after layer, then the final norm if no layer of the
    text encoder is left. SD 1.x's is all of CLIP ViT-L/14's tower, SD 2.x's is OpenCLIP ViT-H/14's without its last
    layer.
    """
    ours, theirs = _tower(text_encoder), _tower(clip.text_model)
    alike = ("hidden_act", "num_attention_heads", "layer_norm_eps")
    if any(getattr(ours.config, name) != getattr(theirs.config, name) for name in alike):
        return text_encoder
    if not _equal(ours.embeddings, theirs.embeddings):
        return text_encoder
    ours.embeddings = theirs.embeddings
    for i, (own, other) in enumerate(zip(_layers(ours), _layers(theirs), strict=False)):
        if not _equal(own, other):
            return text_encoder
        _layers(ours)[i] = other
    if len(_layers(ours)) > len(_layers(theirs)) or not _equal(ours.final_layer_norm, theirs.final_layer_norm):
        return text_encoder
    ours.final_layer_norm = theirs.final_layer_norm
    if len(_layers(ours)) < len(_layers(theirs)):
        return text_encoder
    if isinstance(clip.text_model, CLIPTextModel):
        return clip.text_model
    text_encoder.text_model = clip.text_model
    return text_encoder


def _equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for every part of a model."""
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()


# --- writing ---------------------------------------------------------------------------------------------------------


def _save_transformer(model: Any, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # transformers 5 loads in the config's dtype: without this, a pipeline stored in half would mix half and float.
    config.dtype = torch.float32
    config.save_pretrained(folder)
    _save_tensors(tensors, folder / TRANSFORMERS_WEIGHTS, dtype)


def _save_tensors(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype | None) -> None:
    stored = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    save_file(stored, file, metadata={"format": "pt"})
    file.chmod(0o666 & ~_umask())  # safetensors leaves its files readable by their owner only


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json for the runtime and transformers 5; vocab.json and merges.txt, for transformers 4."""
    tokenizer.save_pretrained(folder)
    _forget_origin(folder / "tokenizer_config.json")
    backend = getattr(tokenizer, "backend_tokenizer", None) or convert_slow_tokenizer(tokenizer)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))


def _model_index(scheduler: Any) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _forget_origin(file: Path) -> None:
    """Leave out what the libraries note of the folder that they read: a path of this machine, useless on another."""
    content = _json(file)
    for key in ("_name_or_path", "is_local", "local_files_only"):
        content.pop(key, None)
    _write_json(file, content)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _move_into_place(temporary: Path, path: Path, keep: int) -> None:
    """Rename the finished folder to its name; what stood there is set aside first, and goes or is kept last."""
    if not path.exists():
        temporary.rename(path)
        return
    replaced = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.rename(replaced)
    try:
        temporary.rename(path)
    except OSError:
        replaced.rename(path)
        raise
    _retire(replaced, path, keep)


def _retire(replaced: Path, path: Path, keep: int) -> None:
    """Keep an older checkpoint in the history, which holds at most keep - 1, or remove it."""
    history = path.with_name(f"{path.name}.history")
    if keep > 1 and (replaced / "unidiff.json").is_file():
        history.mkdir(exist_ok=True)
        shutil.rmtree(replaced / TRAINING_STATE, ignore_errors=True)  # one goes on from the last alone
        kept = history / f"step-{_json(replaced / 'unidiff.json').get('step', 0):06d}"
        shutil.rmtree(kept, ignore_errors=True)
        replaced.rename(kept)
    shutil.rmtree(replaced, ignore_errors=True)
    if history.is_dir():
        by_age = sorted(history.glob("step-*"), key=lambda folder: folder.stat().st_mtime_ns)
        for folder in by_age[: len(by_age) - (keep - 1)]:
            shutil.rmtree(folder, ignore_errors=True)


def recover(path: Path) -> None:
    """Clear away what a process that was killed while it saved at `path` has left; put back what it had set aside."""
    for leftover in path.parent.glob(f".{path.name}.*"):
        *_, process, kind = leftover.name.split(".")
        if kind not in ("old", "tmp") or not process.isdigit() or _is_running(int(process)):
            continue
        if kind == "old" and not path.exists():
            leftover.rename(path)
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def require_supported(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself. Raises CheckpointError where the losses cannot drive its UNet."""
    scheduler, width = checkpoint.scheduler.config, checkpoint.text_encoder.config.hidden_size
    if refused := refusal(checkpoint.unet.config, checkpoint.vae.config.latent_channels, width):
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    if scheduler.prediction_type not in ("epsilon", "v_prediction"):
        raise CheckpointError(
            f"{checkpoint.path} predicts {scheduler.prediction_type!r}; epsilon and v_prediction can be trained"
        )
    return checkpoint
