"""A checkpoint: a Stable Diffusion pipeline folder with its CLIP, which diffusers and transformers load as it is.

    model_index.json  unet/ vae/ text_encoder/ tokenizer/ scheduler/    read by StableDiffusionPipeline
    clip/                                                               read by CLIPModel
    unidiff.json                                                        provenance: base, data, settings, losses
    README.md                                                           model card

Only safetensors are read. Nothing is unpickled or downloaded.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from unidiff_sdk._internal.files import checked_path
from unidiff_sdk._internal.images import Fit
from unidiff_sdk._internal.json_values import number_within
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.inference.folder.diffusers_folder import refusal, sampler_defaults
from unidiff_sdk.inference.manifest import Resize
from unidiff_sdk.inference.schedule import (
    FlowSchedule,
    Schedule,
    flow_refusal,
    sampler_choice,
    scheduler_refusal,
    stated_settings,
)

from .architectures import MAX_SIZE, METADATA, check_clip_files, check_pipeline_files, require_files, require_generator
from .encoders.image_preprocessing import normalization, preprocessing_refusal
from .json_files import read_json
from .loading.additions import add_to_models
from .loading.models import (
    chosen_variant,
    from_pretrained,
    load_model,
    load_parts,
    load_second,
    load_third,
    load_transformer_parts,
    progress_bars_hidden,
    scheduler_class,
)
from .loading.options import BaseOptions
from .loading.second_text_encoder import (
    SECOND_FILES,
    SecondTextEncoder,
    ThirdTextEncoder,
    has_second_text_encoder,
)
from .loading.single_file import SD15, config_folder
from .loading.textual_inversion import with_names
from .loading.weight_files import CLIP_WEIGHTS, PIPELINE_WEIGHTS, SD3_WEIGHTS, TRANSFORMERS_WEIGHTS, XL_WEIGHTS
from .stable_diffusion_3 import (
    THIRD,
    check_stable_diffusion_3,
    is_stable_diffusion_3,
    refuse_textual_inversions,
    transformer_refusal,
)
from .text_sharing import layers_of, share_projected_text_encoder, share_text_layers, tower_of

__all__ = [
    "METADATA",
    "TINY",
    "Checkpoint",
    "ImageProcessor",
    "assemble_checkpoint",
    "load_checkpoint",
    "load_clip",
    "load_encoders",
    "load_tokenizer",
    "require_supported",
]

TINY = Path(__file__).parents[1] / "recipes" / "tiny_checkpoint"

TOKENIZER = "tokenizer"
PIPELINE_FILES = {
    "model_index.json": "index of the diffusers pipeline",
    "unet/config.json": "UNet",
    "vae/config.json": "VAE",
    "text_encoder/config.json": "text encoder of the pipeline",
    "tokenizer/tokenizer_config.json": TOKENIZER,
    "scheduler/scheduler_config.json": "noise scheduler",
}
ENCODER_FILES = {"config.json": "model", "preprocessor_config.json": "image preprocessing"}
CLIP_FILES = {
    "clip/config.json": "CLIP model",
    "clip/preprocessor_config.json": "image preprocessing of CLIP",
}

# The image processor without torchvision has another name in transformers 5. Version 4.57 has only one class.
ImageProcessor: Any = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one model, on the CPU, in float32 and in eval mode.

    Where `shared` is true, `text_encoder` and the text tower of `clip` are the same parameters.

    Attributes:
        path: Folder, or single file, that the checkpoint was loaded from.
        clip_tokenizer: Tokenizer of CLIP; `tokenizer` is the pipeline's.
        image_processor: Image preprocessing of CLIP.
        meta: Content of unidiff.json. Empty for a folder without it.
        clip_path: Folder that CLIP was loaded from. None for a converted model.
        options: Files that the pipeline was loaded from, with the variant that was chosen, and what was added to it.
        second: Second text encoder of Stable Diffusion XL and 3. None for other models.
        third: Third text encoder of Stable Diffusion 3, if the pipeline has it.
        unet: UNet; the transformer of Stable Diffusion 3.
    """

    path: Path
    unet: UNet2DConditionModel | SD3Transformer2DModel
    vae: AutoencoderKL
    clip: CLIPModel
    text_encoder: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: CLIPTokenizer
    clip_tokenizer: CLIPTokenizer
    scheduler: Any
    image_processor: Any
    meta: dict[str, Any] = field(default_factory=dict)
    clip_path: Path | None = None
    options: BaseOptions = field(default_factory=BaseOptions)
    second: SecondTextEncoder | None = None
    third: ThirdTextEncoder | None = None

    def parts(self) -> dict[str, Any]:
        """The keyword arguments of `save_checkpoint`, except `meta`."""
        names = ("unet", "vae", "clip", "text_encoder", "tokenizer", "clip_tokenizer", "scheduler", "image_processor")
        return {name: getattr(self, name) for name in (*names, "second", "third")}

    def modules(self) -> tuple[torch.nn.Module, ...]:
        """The models."""
        others = [each.model for each in (self.second, self.third) if each is not None]
        return (self.unet, self.vae, self.clip, self.text_encoder, *others)

    @property
    def name(self) -> str:
        """Name in the metadata, or the folder's name."""
        return str(self.meta.get("name", self.path.name))

    @property
    def is_transformer(self) -> bool:
        """Whether it is Stable Diffusion 3: a transformer that was trained by flow matching denoises."""
        return isinstance(self.unet, SD3Transformer2DModel)

    @property
    def denoiser(self) -> str:
        """Name of the part that denoises: "unet" or "transformer"."""
        return "transformer" if self.is_transformer else "unet"

    @property
    def latent_shift(self) -> float:
        """What is subtracted from the latents of the VAE. Only the pipeline of Stable Diffusion 3 follows the VAE's."""
        return float(self.vae.config.shift_factor) if self.is_transformer else 0.0

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: "epsilon", "v_prediction" or "flow"."""
        return FlowSchedule.prediction_type if self.is_transformer else str(self.scheduler.config.prediction_type)

    @property
    def shared(self) -> bool:
        """Whether the pipeline's text encoder and CLIP's text tower are the same parameters."""
        return tower_of(self.text_encoder) is tower_of(self.clip.text_model)

    @property
    def shared_layers(self) -> int:
        """Number of text encoder layers, from the first, that are layers of CLIP's text tower."""
        return sum(a is b for a, b in zip(layers_of(self.text_encoder), layers_of(self.clip.text_model), strict=False))

    @property
    def conditioning_layer(self) -> int | None:
        """Index, from the end, of the CLIP text layer that conditions the UNet: -1 in SD 1.x, -2 in SD 2.x.

        None if the text encoder has layers, or a final norm, that CLIP's text tower does not have. Also None for
        Stable Diffusion XL, whose states have not passed the final norm.
        """
        if self.second is not None:
            return None
        if self.shared:
            return -1
        ours, theirs = tower_of(self.text_encoder), tower_of(self.clip.text_model)
        if self.shared_layers < len(layers_of(ours)) or ours.final_layer_norm is not theirs.final_layer_norm:
            return None
        return self.shared_layers - len(layers_of(theirs)) - 1

    def describe_sharing(self) -> str:
        """One line on the layers that the UNet's text encoder and CLIP's text tower share."""
        ours, theirs = len(layers_of(self.text_encoder)), len(layers_of(self.clip.text_model))
        if not self.shared_layers:
            return "The text encoder and CLIP share no layer. Both are kept, and only pixels couple them."
        common = f"The text encoder shares {self.shared_layers} of its {ours} layers with CLIP ({theirs} layers)."
        if self.conditioning_layer is None:
            return f"{common} Both losses train the shared layers. The other layers stay separate."
        position = {-1: "the last layer", -2: "the second-to-last layer"}.get(
            self.conditioning_layer, f"layer {self.conditioning_layer} from the end"
        )
        return f"{common} Both losses train them, and {position} of CLIP conditions the UNet."

    @property
    def scheduler_config(self) -> dict[str, Any]:
        """Configuration of the scheduler as its file states it, with the name of its class."""
        return stated_settings(self.scheduler.config) | {"_class_name": type(self.scheduler).__name__}

    @property
    def schedule(self) -> Schedule | FlowSchedule:
        """The noise schedule that samplers use."""
        if self.is_transformer:
            return FlowSchedule.from_config(self.scheduler_config)
        return Schedule.from_pipeline(self.scheduler_config)

    @property
    def sampler_defaults(self) -> dict[str, Any]:
        """name, steps and guidance_scale: those of the metadata, else those that the scheduler stands for."""
        return sampler_defaults(self.scheduler_config, self.meta.get("sampler"))

    @property
    def replaced_scheduler(self) -> str | None:
        """The scheduler that the default sampler stands in for, as the runtime does not have it. None if it has."""
        return None if "sampler" in self.meta else sampler_choice(self.scheduler_config).replaces

    @property
    def normalization(self) -> tuple[Any, Any]:
        """(mean, standard deviation) of each RGB channel by which CLIP's pixels in [0, 1] are normalized."""
        return normalization(self.image_processor)

    @property
    def text_widths(self) -> tuple[int, int | None]:
        """Widths of the token states that condition the UNet, and of the pooled embedding of a second text encoder."""
        width = int(self.text_encoder.config.hidden_size)
        if self.second is None:
            return width, None
        return width + int(self.second.model.config.hidden_size), self.second.pooled_width

    @property
    def image_size(self) -> int:
        """Side, in pixels, of the square images that the model generates."""
        return int(self.unet.config.sample_size) * self.latent_factor

    @property
    def fit(self) -> Fit:
        """How training made images square: "pad" if the metadata says so, else "crop"."""
        return "pad" if self.meta.get("fit") == "pad" else "crop"

    def resize_for(self, fit: Fit) -> Resize | None:
        """How images are resized before the crop: always as CLIP does, see `require_supported`."""
        return None

    @property
    def block(self) -> int:
        """Sides of images are multiples of this many pixels: each block of the UNet but the last halves them.

        A transformer divides them into patches.
        """
        if self.is_transformer:
            return int(self.latent_factor * self.unet.config.patch_size)
        return int(self.latent_factor * 2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def largest_side(self) -> int | None:
        """The most pixels along a side that a transformer has positions for. None for a UNet, which has no limit."""
        return self.block * int(self.unet.config.pos_embed_max_size) if self.is_transformer else None

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)


def load_checkpoint(path: str | Path, options: BaseOptions | None = None) -> Checkpoint:
    """Load a checkpoint folder, or the built-in base by the name "tiny".

    Weights become float32, whatever precision is stored. Raises CheckpointError if a part is missing, unreadable or
    incomplete.
    """
    folder = TINY if str(path) == "tiny" else checked_path(path, CheckpointError)
    require_generator(folder)
    require_files(folder, CLIP_FILES | ({} if is_stable_diffusion_3(folder) else PIPELINE_FILES))
    clip, image_processor = load_clip(folder / "clip")
    has_tokenizer = (folder / "clip" / "tokenizer_config.json").is_file()
    clip_tokenizer = from_pretrained(CLIPTokenizer, folder / "clip") if has_tokenizer else None
    checkpoint = assemble_checkpoint(folder, clip, image_processor, clip_tokenizer, options)
    return replace(checkpoint, clip_path=folder / "clip")


def load_clip(folder: Path, variant: str | None = None) -> tuple[CLIPModel, Any]:
    """Load a transformers CLIP folder: the model, float32 in eval mode, and its image processor.

    variant: Variant of the weight file, such as "fp16". Raises CheckpointError if a part is missing, unreadable or
    incomplete.
    """
    require_files(folder, ENCODER_FILES)
    check_clip_files(folder)
    clip, image_processor = load_encoders(folder, CLIPModel, ImageProcessor, variant)
    return clip, image_processor


def load_encoders(folder: Path, model_class: Any, processor_class: Any, variant: str | None = None) -> tuple[Any, Any]:
    """Load a transformers folder with encoders of the given classes: the model and its image processor.

    Raises CheckpointError if a part is missing, unreadable or incomplete.
    """
    require_files(folder, ENCODER_FILES)
    variant = chosen_variant(folder, CLIP_WEIGHTS, variant)
    with progress_bars_hidden():
        return load_model(model_class, folder, variant), from_pretrained(processor_class, folder)


def load_tokenizer(folder: Path, tokenizer_class: Any = CLIPTokenizer) -> Any:
    """Load the tokenizer in a folder. Raises CheckpointError if it cannot be read."""
    return from_pretrained(tokenizer_class, folder)


def assemble_checkpoint(
    source: Path,
    clip: CLIPModel,
    image_processor: Any,
    clip_tokenizer: CLIPTokenizer | None = None,
    options: BaseOptions | None = None,
) -> Checkpoint:
    """Combine a Stable Diffusion pipeline (1, 2, XL or 3) with a CLIP model, sharing their common text layers.

    Args:
        source: Folder of the pipeline, or a safetensors file in the original layout.
        clip: CLIP model.
        image_processor: Image preprocessing of CLIP.
        clip_tokenizer: Tokenizer of CLIP. Default: the pipeline's. Needed for a file without a configuration folder.
        options: Files to load, and what to add.

    Raises:
        CheckpointError: A part is missing, unreadable or incomplete, or an addition does not fit.
    """
    options = options or BaseOptions()
    options = replace(options, textual_inversions=with_names(options.textual_inversions))
    folder, is_file = config_folder(source, options), source.is_file()
    if is_stable_diffusion_3(folder):
        if is_file:
            raise CheckpointError(
                f"{source}: Stable Diffusion 3 is read from a folder of diffusers, not a single file."
            )
        return _assemble_stable_diffusion_3(folder, clip, image_processor, clip_tokenizer, options)
    is_xl = has_second_text_encoder(folder)
    files = PIPELINE_FILES | (SECOND_FILES if is_xl else {})
    require_files(folder, {name: part for name, part in files.items() if folder != SD15 or part != TOKENIZER})
    check_pipeline_files(folder)
    with progress_bars_hidden():
        tokenizer = clip_tokenizer if folder == SD15 else from_pretrained(CLIPTokenizer, folder / "tokenizer")
        _check_vocabulary(folder, tokenizer)
        if not is_file:
            weights = XL_WEIGHTS if is_xl else PIPELINE_WEIGHTS
            options = replace(options, variant=chosen_variant(folder, weights, options.variant))
        unet, text_encoder, vae = load_parts(source, folder, options)
        clip_tokenizer = clip_tokenizer or tokenizer
        if options.textual_inversions:
            tokenizer = deepcopy(tokenizer)  # CLIP's keeps its vocabulary
        second = load_second(source, folder, options) if is_xl else None
        add_to_models(unet, text_encoder, tokenizer, options, second)
        meta = read_json(folder / METADATA) if not is_file and (folder / METADATA).exists() else {}
        return Checkpoint(
            path=source,
            unet=unet,
            vae=vae,
            clip=clip,
            text_encoder=share_text_layers(text_encoder, clip),
            tokenizer=tokenizer,
            clip_tokenizer=clip_tokenizer,
            scheduler=from_pretrained(scheduler_class(folder), folder / "scheduler"),
            image_processor=image_processor,
            meta=options.recorded(meta),
            options=options,
            second=second,
        )


def _assemble_stable_diffusion_3(
    folder: Path, clip: CLIPModel, image_processor: Any, clip_tokenizer: CLIPTokenizer | None, options: BaseOptions
) -> Checkpoint:
    """`assemble_checkpoint` for Stable Diffusion 3."""
    check_stable_diffusion_3(folder)
    refuse_textual_inversions(folder, options)
    has_third = (folder / THIRD).is_dir()
    weights = SD3_WEIGHTS | ({THIRD: TRANSFORMERS_WEIGHTS} if has_third else {})
    with progress_bars_hidden():
        tokenizer = from_pretrained(CLIPTokenizer, folder / "tokenizer")
        _check_vocabulary(folder, tokenizer)
        options = replace(options, variant=chosen_variant(folder, weights, options.variant))
        transformer, text_encoder, vae = load_transformer_parts(folder, options)
        second = replace(load_second(folder, folder, options), zero_negative=False)
        add_to_models(transformer, text_encoder, tokenizer, options, second)
        meta = read_json(folder / METADATA) if (folder / METADATA).exists() else {}
        return Checkpoint(
            path=folder,
            unet=transformer,
            vae=vae,
            clip=clip,
            text_encoder=share_projected_text_encoder(text_encoder, clip),
            tokenizer=tokenizer,
            clip_tokenizer=clip_tokenizer or tokenizer,
            scheduler=from_pretrained(scheduler_class(folder), folder / "scheduler"),
            image_processor=image_processor,
            meta=options.recorded(meta),
            options=options,
            second=second,
            third=load_third(folder, options) if has_third else None,
        )


def _check_vocabulary(folder: Path, tokenizer: Any) -> None:
    """Check that the text encoder of a pipeline embeds all tokens. Raises CheckpointError if not."""
    embedded = read_json(folder / "text_encoder" / "config.json").get("vocab_size", len(tokenizer))
    embedded = int(number_within(f"vocab_size of {folder}", embedded, 1, MAX_SIZE, CheckpointError, whole=True))
    if len(tokenizer) > embedded:
        raise CheckpointError(
            f"The tokenizer of {folder} has {len(tokenizer):,} tokens, but its text encoder embeds {embedded:,}. "
            "Remove the added tokens, or save the text encoder with their embeddings."
        )


def require_supported(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint itself. Raises CheckpointError if the runtime cannot generate with its UNet."""
    if checkpoint.is_transformer and checkpoint.second is not None:
        texts = [model.config.to_dict() for model in (checkpoint.text_encoder, checkpoint.second.model)]
        refused = transformer_refusal(checkpoint.unet.config, checkpoint.vae.config, *texts)
        refused = refused or flow_refusal(checkpoint.scheduler_config)
    else:
        refused = refusal(checkpoint.unet.config, checkpoint.vae.config, *checkpoint.text_widths)
        refused = refused or scheduler_refusal(checkpoint.scheduler_config)
    if refused:
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    if refused := preprocessing_refusal(checkpoint.image_processor, checkpoint.clip.config.vision_config.image_size):
        raise CheckpointError(f"{checkpoint.path}: {refused}")
    if checkpoint.prediction_type not in ("epsilon", "v_prediction", "flow"):
        raise CheckpointError(
            f"The UNet of {checkpoint.path} predicts {checkpoint.prediction_type!r}. Training supports epsilon and "
            "v_prediction."
        )
    return checkpoint
