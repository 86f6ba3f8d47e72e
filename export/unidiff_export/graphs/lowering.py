"""Lower PyTorch modules to ONNX graphs with the operators that the target runs fastest.

Opset 23 has `Attention` and `GroupNormalization`. `torch.onnx.export(dynamo=True)` emits them for
`scaled_dot_product_attention` and `GroupNorm`, so no pattern matching is needed afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from transformers import CLIPTextConfig, Siglip2Model, Siglip2TextConfig, SiglipModel, SiglipTextConfig, T5Config

from unidiff_export.options import TARGETS, Target
from unidiff_export.quantization.qdq import name_by_layer
from unidiff_sdk._internal.warnings import quiet_logging
from unidiff_sdk.errors import ExportError
from unidiff_sdk.inference.folder.diffusers_folder import refusal
from unidiff_sdk.inference.manifest import TIME_IDS, TRANSFORMER, UNET
from unidiff_sdk.training.checkpoints.loading.second_text_encoder import THIRD_TOKENS
from unidiff_sdk.training.checkpoints.text_sharing import tower_of

from .adapters import add_adapter_inputs
from .attention import attention_layers, causal_by_flag, check_attention, translations
from .passes import rewrite_for_cpu
from .siglip import NaflexImageEncoder, SiglipImageEncoder, SiglipTextEmbedder
from .text_encoders import HiddenStates, ThirdTextEncoder
from .timesteps import one_for_each_sample
from .transformer import Transformer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel

    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

# The largest side of latents for tracing and for comparing single graphs. Graphs accept any size, the native size of
# Stable Diffusion would take minutes and many gigabytes, and whole images are compared at that size anyway.
LARGEST_EXAMPLE = 16

IMAGE_AXES = {0: "batch", 2: "height", 3: "width"}
TOKEN_AXES = {"input_ids": {0: "batch", 1: "tokens"}}


class TextEncoder(nn.Module):
    """Token ids to the hidden states that condition the UNet and to the embedding for search, in one graph."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.tower, self.projection = clip.text_model, clip.text_projection

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        states = self.tower(input_ids=input_ids)
        return states.last_hidden_state.float(), self.projection(states.pooler_output).float()


class PromptEncoder(nn.Module):
    """Token ids to the hidden states that condition the UNet, if search has another text encoder."""

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.tower = text_encoder

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tower(input_ids=input_ids).last_hidden_state.float()


class TextEmbedder(nn.Module):
    """Token ids to the projected embedding of the text, not normalized, as in transformers."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.tower, self.projection = clip.text_model, clip.text_projection

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.projection(self.tower(input_ids=input_ids).pooler_output).float()


class ImageEncoder(nn.Module):
    """Normalized pixels to the projected embedding of the image, not normalized, as in transformers."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.tower, self.projection = clip.vision_model, clip.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.tower(pixel_values=pixel_values.to(self.projection.weight.dtype))
        return self.projection(states.pooler_output).float()


class UNet(nn.Module):
    """Noisy latents to the model's output. `timestep` is a float for each sample, or one for all samples.

    That of Stable Diffusion XL also takes a pooled embedding and the sizes of the image.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        timestep, dtype = one_for_each_sample(timestep, sample), self.unet.dtype
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        states = encoder_hidden_states.to(dtype)
        return self.unet(sample.to(dtype), timestep, states, added_cond_kwargs=added).sample.float()


class VaeDecoder(nn.Module):
    """Latents divided by the scaling factor, the convention of diffusers and optimum, to pixels in [-1, 1]."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> Tensor:
        return self.vae.decode(latent_sample.to(self.vae.dtype)).sample.float()


class VaeEncoder(nn.Module):
    """Pixels in [-1, 1] to the mean of their latents, not multiplied by the scaling factor."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> Tensor:
        return self.vae.encode(sample.to(self.vae.dtype)).latent_dist.mode().float()


@dataclass(frozen=True)
class GraphSpec:
    """One graph of a bundle: the module behind it and its interface.

    Attributes:
        name: the graph's folder in the bundle.
        module: the PyTorch module.
        attention_layers: number of attention layers in one call.
        inputs: the dynamic axes of each input.
        outputs: the names of the results, in order.
        example: returns random inputs for a batch size and a factor of the height of images and latents.
        typical_sizes: the most frequent sizes of dynamic axes.
        adapted: the layers whose LoRAs can be switched, by their names in the module.
    """

    name: str
    module: nn.Module
    attention_layers: int
    inputs: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    example: Callable[[int, int], tuple[Tensor, ...]]
    typical_sizes: Mapping[str, int] = field(default_factory=dict)
    adapted: Mapping[str, nn.Module] = field(default_factory=dict)

    @property
    def denoises(self) -> bool:
        """Whether it is the UNet or the transformer."""
        return self.name in (UNET.graph, TRANSFORMER.graph)


def graph_specs(checkpoint: Checkpoint) -> list[GraphSpec]:
    """Return the graphs of `checkpoint`: those of generation in their order, then those that only search needs.

    Raises:
        ExportError: the UNet is not a text-to-image UNet of Stable Diffusion 1, 2 or XL.
    """
    clip, vae = checkpoint.clip, checkpoint.vae
    denoiser, latent = _transformer_spec(checkpoint) if checkpoint.is_transformer else _unet_spec(checkpoint)
    pixels = latent * checkpoint.latent_factor

    def latents(batch: int, scale: int) -> tuple[Tensor, ...]:
        unit = torch.randn(batch, vae.config.latent_channels, scale * latent, latent)
        return (unit / vae.config.scaling_factor + checkpoint.latent_shift,)

    def images(batch: int, scale: int) -> tuple[Tensor, ...]:
        return (torch.rand(batch, vae.config.in_channels, scale * pixels, pixels) * 2 - 1,)

    texts = [
        _spec("text_encoder", *prompt_encoder(checkpoint), TOKEN_AXES, _random_ids(checkpoint.text_encoder.config))
    ]
    if checkpoint.second is not None:
        second = HiddenStates.of_second(checkpoint.second.model)
        texts.append(_spec("text_encoder_2", second, second.outputs, TOKEN_AXES, _random_ids(second.tower.config)))
    if checkpoint.third is not None:
        third = ThirdTextEncoder(checkpoint.third.model)
        texts.append(
            _spec(
                "text_encoder_3",
                third,
                ("last_hidden_state",),
                {"input_ids": {0: "batch"}},
                _third_ids(checkpoint.third.model.config),
            )
        )
    search = encoder_specs(clip)[1:] if checkpoint.shared else encoder_specs(clip, "clip_text_encoder")
    native = checkpoint.unet.config.sample_size
    latent_side, side = ({"height": size, "width": size} for size in (native, native * checkpoint.latent_factor))
    decoder, encoder = VaeDecoder(vae), VaeEncoder(vae)
    return [
        *texts,
        denoiser,
        _spec(
            "vae_decoder",
            decoder,
            ("sample",),
            {"latent_sample": IMAGE_AXES},
            latents,
            vae.decoder,
            typical_sizes=latent_side,
        ),
        _spec(
            "vae_encoder", encoder, ("latent_sample",), {"sample": IMAGE_AXES}, images, vae.encoder, typical_sizes=side
        ),
        *search,
    ]


def _unet_spec(checkpoint: Checkpoint) -> tuple[GraphSpec, int]:
    """Return the graph of a UNet, and the side of the latents for tracing. Raises ExportError as `graph_specs`."""
    unet, tokens = checkpoint.unet, checkpoint.text_encoder.config.max_position_embeddings
    if refused := refusal(unet.config, checkpoint.vae.config, *checkpoint.text_widths):
        raise ExportError(refused)
    # two pixels per side in the middle block; one would be traced as a constant
    smallest = 2 ** len(unet.config.block_out_channels)
    _, pooled = checkpoint.text_widths
    native, native_side = unet.config.sample_size, checkpoint.image_size
    latent = min(native, max(LARGEST_EXAMPLE, smallest))

    def noisy_latents(batch: int, scale: int) -> tuple[Tensor, ...]:
        states = torch.randn(batch, tokens, unet.config.cross_attention_dim)
        sample = torch.randn(batch, unet.config.in_channels, scale * latent, latent)
        added = () if pooled is None else (torch.randn(batch, pooled), torch.rand(batch, TIME_IDS) * 2 * native_side)
        return sample, torch.rand(batch) * 999, states, *added

    noisy = {"sample": IMAGE_AXES, "timestep": {0: "steps"}, "encoder_hidden_states": {0: "batch", 1: "tokens"}}
    if pooled is not None:
        noisy |= {"text_embeds": {0: "batch"}, "time_ids": {0: "batch"}}
    sizes = {"height": native, "width": native}
    return _spec("unet", UNet(unet), ("out_sample",), noisy, noisy_latents, typical_sizes=sizes), latent


def _transformer_spec(checkpoint: Checkpoint) -> tuple[GraphSpec, int]:
    """Return the graph of a transformer, and the side of the latents for tracing."""
    config = checkpoint.unet.config
    tokens = checkpoint.text_encoder.config.max_position_embeddings + THIRD_TOKENS
    native, largest = config.sample_size, config.pos_embed_max_size * config.patch_size
    latent = min(native, max(LARGEST_EXAMPLE, 2 * config.patch_size))

    def noisy_latents(batch: int, scale: int) -> tuple[Tensor, ...]:
        height = min(scale * latent, native)  # taller ones have no positions, so the width grows as well
        width = min(scale * latent * latent // height, largest)
        sample = torch.randn(batch, config.in_channels, height, width)
        states = torch.randn(batch, tokens, config.joint_attention_dim)
        return sample, torch.rand(batch) * 999, states, torch.randn(batch, config.pooled_projection_dim)

    axes = {"hidden_states": IMAGE_AXES, "timestep": {0: "steps"}, "encoder_hidden_states": {0: "batch", 1: "tokens"}}
    axes |= {"pooled_projections": {0: "batch"}}
    sizes = {"height": native, "width": native, "tokens": tokens}
    module = Transformer(checkpoint.unet)
    return _spec("transformer", module, (TRANSFORMER.output,), axes, noisy_latents, typical_sizes=sizes), latent


def prompt_encoder(checkpoint: Checkpoint) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the module of the text encoder that conditions the UNet, and its outputs: also "text_embeds" if shared."""
    clip = checkpoint.clip
    if checkpoint.is_transformer:
        states = HiddenStates.of_second(checkpoint.text_encoder)
        return states, states.outputs
    if checkpoint.second is not None:
        shared = (clip.text_model, clip.text_projection) if checkpoint.shared else None
        states = HiddenStates(*shared or (tower_of(checkpoint.text_encoder),))
        return states, states.outputs
    if checkpoint.shared:
        return TextEncoder(clip), ("last_hidden_state", "text_embeds")
    return PromptEncoder(checkpoint.text_encoder), ("last_hidden_state",)


def encoder_specs(
    model: CLIPModel | SiglipModel | Siglip2Model, text_graph: str = "text_encoder", patches: int = 256
) -> list[GraphSpec]:
    """Return the graphs that search needs: the text encoder, under the name `text_graph`, and the image encoder.

    patches: the length of the list of patches that a NaFlex image encoder takes.
    """
    vision = model.config.vision_config

    def pixels(batch: int, scale: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, vision.num_channels, vision.image_size, vision.image_size),)

    def lists_of_patches(batch: int, scale: int) -> tuple[Tensor, ...]:
        values = torch.randn(batch, patches, vision.num_channels * vision.patch_size**2)
        shapes = torch.tensor([[1, patches], [max(1, patches // 3), 2]] * batch)[:batch]
        return values, (torch.arange(patches)[None] < shapes.prod(dim=1)[:, None]).int(), shapes

    ids = _random_ids(model.config.text_config)
    texts: nn.Module
    images: nn.Module
    if isinstance(model, Siglip2Model):
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        axes = {name: {0: "batch"} for name in names}
        return [
            _spec(text_graph, SiglipTextEmbedder(model), ("text_embeds",), TOKEN_AXES, ids),
            _spec("image_encoder", NaflexImageEncoder(model), ("image_embeds",), axes, lists_of_patches),
        ]
    if isinstance(model, SiglipModel):
        texts, images = SiglipTextEmbedder(model), SiglipImageEncoder(model)
    else:
        texts, images = TextEmbedder(model), ImageEncoder(model)
    return [
        _spec(text_graph, texts, ("text_embeds",), TOKEN_AXES, ids),
        _spec("image_encoder", images, ("image_embeds",), {"pixel_values": {0: "batch"}}, pixels),
    ]


def _random_ids(
    config: CLIPTextConfig | SiglipTextConfig | Siglip2TextConfig,
) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return a function that makes random token ids for a batch size."""

    def ids(batch: int, scale: int) -> tuple[Tensor, ...]:
        tokens = torch.randint(0, config.vocab_size, (batch, config.max_position_embeddings))
        if isinstance(config, CLIPTextConfig):
            tokens[:, -1] = end_of_text(config)  # the pooled state is that of this token
        return (tokens,)

    return ids


def _third_ids(config: T5Config) -> Callable[[int, int], tuple[Tensor, ...]]:
    """Return a function that makes random token ids for a batch size, all of the length that is used."""

    def ids(batch: int, scale: int) -> tuple[Tensor, ...]:
        return (torch.randint(0, config.vocab_size, (batch, THIRD_TOKENS)),)

    return ids


def end_of_text(config: CLIPTextConfig) -> int:
    """The token whose state a CLIP text tower pools: by old configurations, which say 2, the one of the highest id."""
    return config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id


def _spec(
    name: str,
    module: nn.Module,
    outputs: tuple[str, ...],
    inputs: Mapping[str, Mapping[int, str]],
    example: Callable[[int, int], tuple[Tensor, ...]],
    layers: nn.Module | None = None,
    typical_sizes: Mapping[str, int] | None = None,
) -> GraphSpec:
    """Return a spec; attention layers are counted in `layers`, the part of `module` that the graph runs."""
    return GraphSpec(
        name, module.eval(), attention_layers(layers or module), inputs, outputs, example, typical_sizes or {}
    )


def lower(spec: GraphSpec, target: Target = TARGETS["cpu"], *, half: bool = False) -> ir.Model:
    """Export `spec` as an ONNX graph; with `half`, it computes in half precision between float32 inputs and outputs.

    A half graph is exported from a half-precision copy of the module, so every cast is where PyTorch puts it.

    Raises:
        ExportError: the exporter failed, an attention layer did not become the target's operator, or the graph holds an
            operator that the target does not have.
    """
    module = deepcopy(spec.module).half() if half else spec.module
    try:
        with quiet(), torch.no_grad(), causal_by_flag(module):
            program = torch.onnx.export(
                module,
                spec.example(2, 1),  # a batch of one would be traced as a constant
                dynamo=True,
                opset_version=target.opset,
                custom_translation_table=translations(target),
                input_names=list(spec.inputs),
                output_names=list(spec.outputs),
                dynamic_shapes=dict(spec.inputs),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"torch cannot export {spec.name} to ONNX: {reason}. "
            "Use the torch and onnxscript versions of constraints.txt."
        ) from error
    assert program is not None  # the signature also covers the legacy exporter, which returns None
    model = program.model
    check_attention(model, spec.attention_layers, target, spec.name)
    check_operators(model, target, spec.name)
    name_by_layer(model)
    add_adapter_inputs(model, spec.adapted, spec.name)
    if target.rewritten:
        rewrite_for_cpu(model, spec.typical_sizes)
    ClearMetadataAndDocStringPass()(model)  # stack traces contain paths of this machine
    return model


def check_operators(model: ir.Model, target: Target, name: str) -> None:
    """Raise ExportError if the graph `name` has another opset than the target, or operators of other domains."""
    opset = model.opset_imports.get("")
    if opset != target.opset:
        raise ExportError(
            f"{name} has opset {opset} instead of {target.opset}. Use the torch version of constraints.txt."
        )
    foreign = {
        f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes() if node.domain not in target.domains
    }
    if foreign:
        raise ExportError(
            f"{name} contains {', '.join(sorted(foreign))}. This target allows only operators of "
            f"{', '.join(domain or 'ai.onnx' for domain in target.domains)}."
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence messages that libraries address to developers (deprecations, missing torchvision, renamed axes)."""
    with quiet_logging(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
