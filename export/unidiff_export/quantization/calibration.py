"""What an export learns by running the PyTorch model on real captions: the span of every layer's values.

Captions become pictures through diffusers' own pipeline, so that the UNet sees the latents of a real sampler's
trajectory at every noise level, with and without a prompt. Everything else follows from these pictures, or from real
ones where there are any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from unidiff_export.bundle_folder import clip_tokenizer
from unidiff_export.graphs.lowering import GraphSpec, quiet
from unidiff_sdk.errors import ExportError
from unidiff_sdk.training.data.captions import normalize_caption, tokenize
from unidiff_sdk.training.data.pairs import load_pairs

from .qdq import LayerRanges, Range

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

Inputs = tuple[Tensor, ...]
Observe = Callable[[str, nn.Module, Tensor, Tensor], None]

# What is drawn where the checkpoint records no captions.
PROMPTS = ("a red dress", "blue striped boots")
# A UNet of more parameters is asked for less, so that the evidence of Stable Diffusion takes minutes on two cores.
LARGE = 100_000_000
LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Effort:
    """How much an export draws and looks up.

    Attributes:
        pictures: drawn for the evidence.
        calibration: drawn to learn the spans of int8.
        steps: of the sampler; None for as many as the bundle uses by default.
        pairs: looked up, at most.
        side: latent positions along a side of the evidence's pictures.
    """

    pictures: int
    calibration: int
    steps: int | None
    pairs: int
    side: int


def effort_for(checkpoint: Checkpoint, precision: str) -> Effort:
    """As much as the model's size allows in a few minutes on two cores.

    Of a large model, fp32 draws at half its side. Lower precisions fail at how large values get, which hangs on the
    size, but fp32 does not; and its UNet is compared over as many positions as it was made for by `random_calls`.
    """
    config = checkpoint.unet.config
    native, halved = config.sample_size, config.sample_size // 2
    if checkpoint.unet.num_parameters() <= LARGE:
        return Effort(pictures=16, calibration=16, steps=None, pairs=200, side=native)
    halves = precision == "fp32" and halved % 2 ** (len(config.block_out_channels) - 1) == 0
    return Effort(pictures=1, calibration=2, steps=5, pairs=64, side=halved if halves else native)


@dataclass(frozen=True)
class Samples:
    """Captions, no two of which say the same, and the pictures that go with them: uint8[s, s, 3], as CLIP sees them."""

    captions: tuple[str, ...]
    pictures: tuple[NDArray[np.uint8], ...] | None = None

    def split(self, calibration: int) -> tuple[Samples, Samples]:
        """(those to judge by, those to calibrate with): at most `calibration` of the latter, and at most half."""
        first = min(calibration, len(self.captions) // 2)
        pictures = self.pictures
        judged = Samples(self.captions[first:], pictures and pictures[first:])
        return judged, Samples(self.captions[:first], pictures and pictures[:first])


def read_samples(
    checkpoint: Checkpoint, data: str | Path | None, limit: int, *, default: tuple[str, ...] = PROMPTS
) -> Samples:
    """The pairs of the catalog `data`; without it, the captions that the checkpoint records (`default` if none).

    Raises DataError where `data` is no catalog.
    """
    if data is None:
        return Samples(_distinct(tuple(checkpoint.meta.get("captions", ())) or default))
    pairs = load_pairs(data, checkpoint, limit=limit)
    captions = _distinct(pairs.captions)
    rows = torch.tensor([pairs.captions.index(caption) for caption in captions])
    return Samples(captions, tuple(pairs.clip_images[rows].permute(0, 2, 3, 1).numpy()))


def _distinct(captions: Sequence[str]) -> tuple[str, ...]:
    """The first of those that say the same."""
    first: dict[str, str] = {}
    for caption in captions:
        first.setdefault(normalize_caption(caption), caption)
    return tuple(first.values())


# --- drawing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """What diffusers' pipeline drew in float32 PyTorch, and from what.

    Attributes:
        noise: where it started, float32[n, channels, height, width].
        latents: where it ended, as the VAE decoder takes them.
        pictures: uint8[height, width, 3] for each prompt.
        unet_inputs: what the UNet was called with, at each step.
    """

    prompts: tuple[str, ...]
    noise: NDArray[np.float32]
    latents: Tensor
    pictures: tuple[NDArray[np.uint8], ...]
    unet_inputs: tuple[Inputs, ...]


def draw(
    checkpoint: Checkpoint,
    scheduler: SchedulerMixin,
    prompts: Sequence[str],
    *,
    side: int,
    seed: int,
    steps: int,
    guidance_scale: float,
) -> Drawing:
    """Draw each prompt once with diffusers' StableDiffusionPipeline, from `side` x `side` latent positions."""
    shape = (len(prompts), checkpoint.unet.config.in_channels, side, side)
    noise = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    calls: list[Inputs] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample, timestep = args
        calls.append((sample, timestep.float().reshape(-1).expand(len(sample)), kwargs["encoder_hidden_states"]))

    with quiet():
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline(
            vae=checkpoint.vae,
            text_encoder=checkpoint.text_encoder,
            tokenizer=checkpoint.tokenizer,
            unet=checkpoint.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        handle = checkpoint.unet.register_forward_pre_hook(record, with_kwargs=True)
        try:
            latents = pipeline(
                list(prompts),
                latents=torch.from_numpy(noise),
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="latent",
            ).images
        finally:
            handle.remove()
        latents = latents / checkpoint.vae.config.scaling_factor + (checkpoint.vae.config.shift_factor or 0)
        with torch.no_grad():
            decoded = checkpoint.vae.decode(latents).sample
        pictures = pipeline.image_processor.postprocess(decoded, output_type="pil")
    return Drawing(tuple(prompts), noise, latents, tuple(map(np.asarray, pictures)), tuple(calls))


def inputs_of(
    checkpoint: Checkpoint, drawing: Drawing, captions: Sequence[str], pictures: Sequence[NDArray[np.uint8]]
) -> dict[str, tuple[Inputs, ...]]:
    """What each graph of a bundle is called with when it draws `drawing` and embeds `captions` and `pictures`.

    pictures: uint8[height, width, 3] each, all of one size.
    """
    drawn = torch.from_numpy(np.stack(drawing.pictures)).permute(0, 3, 1, 2).float() / 255
    pixels = checkpoint.image_processor(list(pictures), return_tensors="pt").pixel_values
    search = {} if checkpoint.shared else {"clip_text_encoder": ((tokenize(clip_tokenizer(checkpoint), captions),),)}
    return search | {
        "text_encoder": ((tokenize(checkpoint.tokenizer, captions),),),
        "unet": drawing.unet_inputs,
        "vae_decoder": ((drawing.latents,),),
        "vae_encoder": ((drawn * 2 - 1,),),
        "image_encoder": ((pixels,),),
    }


# --- what the layers see ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """For each graph: the ranges of its layers, and what it was called with."""

    ranges: dict[str, dict[str, LayerRanges]]
    inputs: dict[str, tuple[Inputs, ...]]


def calibrate(
    checkpoint: Checkpoint, specs: Sequence[GraphSpec], samples: Samples, draw_it: Callable[[Sequence[str]], Drawing]
) -> Calibration:
    """Draw the captions of `samples`, embed them and their pictures (the drawn ones if they have none), and look on."""
    ranges: dict[str, dict[str, LayerRanges]] = {spec.name: {} for spec in specs}

    def watch(seen: dict[str, LayerRanges]) -> Observe:
        def observe(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
            now = LayerRanges(_range(x), _range(y))
            before = seen.get(name, now)
            seen[name] = LayerRanges(before.input | now.input, before.output | now.output)

        return observe

    with ExitStack() as watching, torch.no_grad():
        for spec in specs:
            watching.enter_context(observing(spec, watch(ranges[spec.name])))
        drawing = draw_it(samples.captions)  # text encoder, UNet and VAE decoder
        inputs = inputs_of(checkpoint, drawing, samples.captions, samples.pictures or drawing.pictures)
        for spec in specs:
            if spec.name not in ("unet", "vae_decoder"):
                for call in inputs[spec.name]:
                    spec.module(*call)
    return Calibration(ranges, inputs)


def layer_errors(spec: GraphSpec, calls: Iterable[Inputs], ranges: Mapping[str, LayerRanges]) -> dict[str, float]:
    """How sensitive each layer is: the error of its output when it alone is quantized, relative to the output.

    ‖y_q − y‖² / ‖y‖² over all `calls`, for weights of one scale a channel and activations of one scale a tensor.
    """
    noise: dict[str, float] = dict.fromkeys(ranges, 0.0)
    power: dict[str, float] = dict.fromkeys(ranges, 0.0)

    def observe(name: str, layer: Any, x: Tensor, y: Tensor) -> None:
        if name not in ranges:
            return
        weight = layer.weight
        scales = weight.abs().amax(dim=tuple(range(1, weight.ndim))).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        codes = torch.fake_quantize_per_channel_affine(
            weight, scales, torch.zeros(len(scales), dtype=torch.int32), 0, -127, 127
        )
        # torch's functions, not the layer itself: calling that would observe again
        x = _fake(x, ranges[name].input)
        if isinstance(layer, nn.Conv2d):
            how: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
            result = _fake(nn.functional.conv2d(x, codes, layer.bias, *how), ranges[name].output)
        else:
            result = nn.functional.linear(x, codes, layer.bias)
        noise[name] += float((result - y).double().square().sum())
        power[name] += float(y.double().square().sum())

    with observing(spec, observe), torch.no_grad():
        for inputs in calls:
            spec.module(*inputs)
    return {name: noise[name] / max(power[name], np.finfo(float).tiny) for name in ranges}


def multiply_adds(spec: GraphSpec, inputs: Inputs) -> tuple[dict[str, int], int]:
    """({layer: its multiply-adds}, those of the whole graph with its attention products) for one call.

    By the shapes alone; nothing is computed.
    """
    # torch counts the fused attention of GPUs only
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop}
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as fake, counter:
        spec.module(*map(fake.from_tensor, inputs))
    counts = {name: sum(by_operator.values()) // 2 for name, by_operator in counter.get_flop_counts().items()}
    root = type(spec.module).__name__
    layers = {name: counts.get(f"{root}.{name}", 0) for name, module in _layers(spec)}
    return layers, counter.get_total_flops() // 2


def _attention_flop(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _layers(spec: GraphSpec) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in spec.module.named_modules() if isinstance(module, LAYERS)]


@contextmanager
def observing(spec: GraphSpec, observe: Observe) -> Iterator[None]:
    """Call `observe` with every layer's name, module, input and output whenever it runs."""
    with ExitStack() as hooks:
        for name, module in _layers(spec):

            def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                observe(name, layer, args[0], output)

            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _range(x: Tensor) -> Range:
    low, high = torch.aminmax(x)
    if not (low.isfinite() and high.isfinite()):
        raise ExportError("the model gives values that are not finite on its own captions: train again, or go back")
    return Range.of(low.item(), high.item())


def _fake(x: Tensor, span: Range) -> Tensor:
    """`x` as its codes can say it."""
    return torch.fake_quantize_per_tensor_affine(x, float(span.scale), int(span.zero_point), 0, 255)
