"""What diffusers and transformers compute for a checkpoint, by the calls that their users make.

Everything is loaded from the checkpoint's own folder: `StableDiffusionPipeline`, `CLIPModel` and `CLIPProcessor` with
their own configuration files. So a bundle is compared with the model as it was published, not with a copy of it.
"""

from __future__ import annotations

import inspect
import string
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from unidiff_sdk._internal.images import Fit
from unidiff_sdk.errors import ExportError
from unidiff_sdk.generation.generator import image_rng
from unidiff_sdk.inference.schedule import FOLLOWED_OPTIONS
from unidiff_sdk.training.checkpoints.encoders.siglip import is_sentencepiece
from unidiff_sdk.training.checkpoints.loading.additions import add_to_pipeline
from unidiff_sdk.training.checkpoints.loading.single_file import SD15, config_folder, load_vae_file
from unidiff_sdk.training.checkpoints.loading.weight_files import CLIP_WEIGHTS, VAE_WEIGHTS, choose_variant

from .graphs.lowering import quiet

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint
    from unidiff_sdk.training.checkpoints.encoders.search_model import SearchModel

Inputs = tuple[Tensor, ...]
ImageArray = NDArray[np.uint8]

# The diffusers scheduler of each sampler, and its options.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {"use_karras_sigmas": False}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": False}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "lcm": ("LCMScheduler", {}),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
}

NO_SAFETY_CHECKER: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}

# What embeddings are compared on: texts and images that a tokenizer or a preprocessing may treat in another way.
ODD_TEXTS = (
    "",
    "a photo of a RED dress!",
    "Ünïcode — 日本 & <b>tags</b>",
    "don't   SHOUT\n",
    "! !! 🙂 12.5%",
    "long " * 100,
)
ODD_SIZES = ((97, 161), (300, 40), (5, 7), (64, 64))
ODD_MODES = ("RGB", "L", "RGB", "RGB")  # of the image of each size


@dataclass(frozen=True)
class GeneratedImages:
    """Images that diffusers' pipeline generated in float32 PyTorch, and the values on the way.

    Attributes:
        prompts: one for each image.
        negative_prompt: of all images.
        noise: the initial latents, float32[n, channels, height, width].
        latents: the final latents, as the VAE decoder takes them.
        images: uint8[height, width, 3] for each prompt.
        denoiser_inputs: the inputs of the UNet or the transformer at each step.
    """

    prompts: tuple[str, ...]
    negative_prompt: str
    noise: NDArray[np.float32]
    latents: Tensor
    images: tuple[ImageArray, ...]
    denoiser_inputs: tuple[Inputs, ...]


# --- generation ------------------------------------------------------------------------------------------------------


def load_pipeline(checkpoint: Checkpoint, sampler: str, folder: Path | None = None) -> Any:
    """Return a StableDiffusionPipeline, or that of XL or 3, with diffusers' scheduler of a sampler.

    Args:
        checkpoint: the models of the pipeline if there is no folder.
        sampler: see SCHEDULERS.
        folder: the pipeline folder that `from_pretrained` reads, or the file that `from_single_file` reads, weights
            included. The additions of the checkpoint are loaded as well.
    """
    with _quiet():
        pipeline_class, absent = _pipeline_class(checkpoint)
        if folder is not None:
            pipeline = _load_from_disk(checkpoint, sampler, folder)
        else:
            pipeline = pipeline_class(
                vae=checkpoint.vae,
                text_encoder=checkpoint.text_encoder,
                tokenizer=checkpoint.tokenizer,
                **{checkpoint.denoiser: checkpoint.unet},
                scheduler=reference_scheduler(checkpoint, sampler),
                **_second_parts(checkpoint),
                **absent,
            )
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_class(checkpoint: Checkpoint) -> tuple[Any, dict[str, Any]]:
    """Return the pipeline of diffusers for a checkpoint, and the arguments for the parts that are not exported."""
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    absent: dict[str, Any] = {"feature_extractor": None, "image_encoder": None}
    if checkpoint.is_transformer:
        third = {"text_encoder_3": None, "tokenizer_3": None} if checkpoint.third is None else {}
        return StableDiffusion3Pipeline, absent | third
    if checkpoint.second is None:
        return StableDiffusionPipeline, absent | NO_SAFETY_CHECKER
    return StableDiffusionXLPipeline, absent | {"add_watermarker": False}


def _load_from_disk(checkpoint: Checkpoint, sampler: str, source: Path) -> Any:
    """Load a pipeline by `from_pretrained` or, for a file, by `from_single_file`, with the checkpoint's additions."""
    pipeline_class, absent = _pipeline_class(checkpoint)
    config = config_folder(source, checkpoint.options)
    options: dict[str, Any] = {
        "scheduler": reference_scheduler(checkpoint, sampler, config),
        "torch_dtype": torch.float32,
        "local_files_only": True,
        **_other_vae(checkpoint, config),
        **absent,
    }
    if source.is_file():
        if config == SD15:  # which has no tokenizer
            options["tokenizer"] = deepcopy(checkpoint.clip_tokenizer)  # tokens may be added to it
        pipeline = pipeline_class.from_single_file(str(source), config=str(config), **options)
    else:
        variant = checkpoint.options.variant
        pipeline = pipeline_class.from_pretrained(source, use_safetensors=True, variant=variant, **options)
    add_to_pipeline(pipeline, checkpoint.options)
    return pipeline


def _second_parts(checkpoint: Checkpoint) -> dict[str, Any]:
    """The arguments of pipelines with two text encoders that other pipelines do not have."""
    second = checkpoint.second
    if second is None:
        return {}
    parts = {"text_encoder_2": second.model, "tokenizer_2": second.tokenizer}
    if checkpoint.third is not None:
        parts |= {"text_encoder_3": checkpoint.third.model, "tokenizer_3": checkpoint.third.tokenizer}
    return parts if checkpoint.is_transformer else parts | {"force_zeros_for_empty_prompt": second.zero_negative}


def _other_vae(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """The VAE that was named to replace that of the pipeline, by the loaders of diffusers."""
    from diffusers import AutoencoderKL

    path = checkpoint.options.vae
    if path is None:
        return {}
    if path.is_file():
        return {"vae": load_vae_file(path, folder / "vae")}
    variant = choose_variant(path, VAE_WEIGHTS)
    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    return {"vae": AutoencoderKL.from_pretrained(path, torch_dtype=torch.float32, variant=variant, **options)}


def reference_scheduler(checkpoint: Checkpoint, sampler: str, folder: Path | None = None) -> SchedulerMixin:
    """Return diffusers' scheduler of a sampler with the checkpoint's configuration, as its users replace a scheduler.

    Options of the configuration that the sampler does not follow are set to those of the sampler.
    """
    import diffusers

    name, options = SCHEDULERS[sampler]
    scheduler_class = getattr(diffusers, name)
    known = inspect.signature(scheduler_class.__init__).parameters
    followed = {option: values[1] for option, values in FOLLOWED_OPTIONS.items() if len(values) > 1}
    options = {option: value for option, value in followed.items() if option in known} | options
    if folder is None:
        return scheduler_class.from_config(checkpoint.scheduler.config, **options)
    return scheduler_class.from_pretrained(folder, subfolder="scheduler", local_files_only=True, **options)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence messages to developers, and the progress bars of loading."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [each for each in (diffusers_logging, transformers_logging) if each.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        with quiet():
            yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    side: int,
    seed: int,
    steps: int,
    guidance_scale: float,
    negative_prompt: str = "",
) -> GeneratedImages:
    """Generate one image of each prompt with a pipeline of diffusers, from `side` x `side` latents.

    The noise of stochastic schedulers is that of our runtime: each image has the generator of seed 0.
    """
    denoiser = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    shape = (len(prompts), denoiser.config.in_channels, side, side)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    calls: list[Inputs] = []
    latents: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            sample, timestep = args
            added = tuple((kwargs.get("added_cond_kwargs") or {}).values())
        else:
            sample, timestep, added = kwargs["hidden_states"], kwargs["timestep"], (kwargs["pooled_projections"],)
        timesteps = timestep.float().reshape(-1).expand(len(sample))
        calls.append((sample, timesteps, kwargs["encoder_hidden_states"], *added))

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents[:] = [values["latents"]]
        return values

    handle = denoiser.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with quiet(), _runtime_noise(pipeline.scheduler):
            images = pipeline(
                list(prompts),
                negative_prompt=[negative_prompt] * len(prompts) if negative_prompt else None,
                height=side * pipeline.vae_scale_factor,
                width=side * pipeline.vae_scale_factor,
                latents=torch.from_numpy(noise),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                callback_on_step_end=on_step_end,
            ).images
    finally:
        handle.remove()
    # Other pipelines than that of Stable Diffusion 3 ignore the shift.
    shift = 0.0 if hasattr(pipeline, "unet") else pipeline.vae.config.shift_factor
    scaled = latents[0] / pipeline.vae.config.scaling_factor + shift
    return GeneratedImages(tuple(prompts), negative_prompt, noise, scaled, tuple(map(np.asarray, images)), tuple(calls))


@contextmanager
def _runtime_noise(scheduler: SchedulerMixin) -> Iterator[None]:
    """Within the block, a stochastic scheduler adds the noise that our runtime adds. PyTorch's generators differ."""
    module: Any = sys.modules[type(scheduler).__module__]
    theirs = getattr(module, "randn_tensor", None)
    if theirs is None:
        yield
        return
    streams: list[np.random.Generator] = []

    def ours(shape: Sequence[int], **options: Any) -> Tensor:
        streams.extend(image_rng(0) for _ in range(len(streams), shape[0]))
        noise = [stream.standard_normal(tuple(shape[1:]), dtype=np.float32) for stream in streams]
        return torch.from_numpy(np.stack(noise))

    module.randn_tensor = ours
    try:
        yield
    finally:
        module.randn_tensor = theirs


# --- embeddings ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceEmbeddings:
    """Odd texts and images, and their unit embeddings by CLIPModel: float32[n, dim]."""

    texts: tuple[str, ...]
    images: tuple[Image.Image, ...]
    text_embeddings: NDArray[np.float32]
    image_embeddings: NDArray[np.float32]


def embed_odd_inputs(checkpoint: Checkpoint, folder: Path | None = None) -> ReferenceEmbeddings:
    """Embed ODD_TEXTS and images of ODD_SIZES with CLIPModel and CLIPProcessor.

    Args:
        checkpoint: the model and its preprocessing if there is no folder.
        folder: the CLIP folder that `from_pretrained` reads.

    Raises:
        ExportError: transformers cannot embed them.
    """
    clip = _ClipParts(checkpoint.clip, checkpoint.clip_tokenizer, checkpoint.image_processor)
    return embed_with_clip(clip, folder, checkpoint.path, checkpoint.fit)


def embed_search_model(model: SearchModel, from_disk: bool = True) -> ReferenceEmbeddings:
    """The same for a model without a generator, loaded again from its folder if it has one and `from_disk`."""
    clip = _ClipParts(model.model, model.tokenizer, model.image_processor)
    return embed_with_clip(clip, model.folder if from_disk else None, model.path, model.fit, model.variant)


class _ClipParts(NamedTuple):
    model: Any
    tokenizer: Any
    image_processor: Any


def embed_with_clip(
    clip: _ClipParts, folder: Path | None, path: Path, fit: Fit, variant: str | None = None
) -> ReferenceEmbeddings:
    """Embed ODD_TEXTS and odd images with CLIP as `from_pretrained` reads `folder`, or as given without a folder.

    path: for messages. fit: how the model was trained. variant: of the weight files of the folder.
    """
    images = _odd_images(fit)
    try:
        with _quiet(), torch.no_grad():
            model, tokenize, preprocess = clip if folder is None else _load_clip(folder, clip.tokenizer, variant)
            length, odd_texts = model.config.text_config.max_position_embeddings, comparable_texts(tokenize)
            tokens = tokenize(
                list(odd_texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
            )
            inputs = {name: tokens[name] for name in ("input_ids", "attention_mask") if name in tokens}
            texts = model.get_text_features(**inputs)
            prepared = [preprocess(image, return_tensors="pt") for image in images]
            names = preprocess.model_input_names
            features = model.get_image_features(
                **{name: torch.cat([each[name] for each in prepared]) for name in names}
            )
    except (ValueError, TypeError, RuntimeError, OSError, AttributeError) as error:
        raise ExportError(
            f"{folder or path}: transformers' CLIPModel and CLIPProcessor cannot embed texts and images "
            f"({error}). Repair the CLIP folder, so that there is something to compare the bundle with."
        ) from error
    return ReferenceEmbeddings(odd_texts, images, unit(texts), unit(features))


def comparable_texts(tokenizer: Any) -> tuple[str, ...]:
    """ODD_TEXTS, without leading punctuation for a SentencePiece tokenizer of transformers.

    It puts one more token before a text that starts with punctuation and a space. The tokenizer.json of the same model,
    and SigLIP's own code, do not.
    """
    if hasattr(tokenizer, "backend_tokenizer"):
        return ODD_TEXTS
    return tuple(text.lstrip(string.punctuation + string.whitespace) for text in ODD_TEXTS)


def _load_clip(folder: Path, tokenizer: Any, variant: str | None = None) -> _ClipParts:
    """Load the folder of a CLIP or SigLIP. `tokenizer` is used if transformers cannot load that of the folder."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import is_sentencepiece_available

    options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True}
    variant = choose_variant(folder, CLIP_WEIGHTS, variant)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, variant=variant, **options).eval()
    has_tokenizer = (folder / "tokenizer_config.json").is_file()  # otherwise the pipeline's own tokenizer is CLIP's
    if model.config.model_type.startswith("siglip") and is_sentencepiece(folder):
        has_tokenizer = is_sentencepiece_available() and (folder / "spiece.model").is_file()
    if has_tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return _ClipParts(model, tokenizer, AutoImageProcessor.from_pretrained(folder, local_files_only=True))


def _odd_images(fit: Fit) -> tuple[Image.Image, ...]:
    """Return smooth images with noise, in color and in gray; squares if the model was trained on padded images."""
    rng, images = np.random.default_rng(0), []
    for (width, height), mode in zip(ODD_SIZES, ODD_MODES, strict=True):
        width, height = (width, height) if fit == "crop" else (width, width)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((width, height))
        noisy = np.asarray(coarse, np.int64) + rng.integers(-20, 20, (height, width, 3))
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode))
    return tuple(images)


def unit(embeddings: Any) -> NDArray[np.float32]:
    """Return embeddings with length 1."""
    tensor: Tensor = getattr(embeddings, "pooler_output", embeddings)  # transformers 5 returns an output object
    return torch.nn.functional.normalize(tensor, dim=-1).numpy()
