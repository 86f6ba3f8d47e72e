"""Calibration: run the PyTorch models on real captions, and record the value range and sensitivity of each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from unidiff_export.graphs.lowering import GraphSpec
from unidiff_export.pipeline import GeneratedImages, Inputs
from unidiff_export.reference import Samples, graph_inputs
from unidiff_sdk.errors import ExportError

from .qdq import LayerRanges, Range

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

Observer = Callable[[str, nn.Module, Tensor, Tensor], None]

# The layers that can be quantized.
LAYERS = (nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Calibration:
    """For each graph: the ranges of its layers, and the inputs that they were recorded with."""

    ranges: dict[str, dict[str, LayerRanges]]
    inputs: dict[str, tuple[Inputs, ...]]


def calibrate(
    checkpoint: Checkpoint,
    specs: Sequence[GraphSpec],
    samples: Samples,
    generate: Callable[[Sequence[str]], GeneratedImages],
) -> Calibration:
    """Record the ranges of all layers while images of the captions are generated and the pairs are embedded.

    Samples without images use the generated ones.
    """
    with _recording(specs) as ranges:
        generated = generate(samples.captions)  # runs the text encoder, the UNet and the VAE decoder
        inputs = graph_inputs(checkpoint, generated, samples.captions, samples.images or generated.images)
        _run([spec for spec in specs if spec.name not in (checkpoint.denoiser, "vae_decoder")], inputs)
    return Calibration(ranges, inputs)


def calibrate_on(specs: Sequence[GraphSpec], inputs: dict[str, tuple[Inputs, ...]]) -> Calibration:
    """Record the ranges of all layers while each graph is called with its `inputs`."""
    with _recording(specs) as ranges:
        _run(specs, inputs)
    return Calibration(ranges, inputs)


@contextmanager
def _recording(specs: Sequence[GraphSpec]) -> Iterator[dict[str, dict[str, LayerRanges]]]:
    """Yield the ranges of the layers of each graph, which calls within the block extend."""
    ranges: dict[str, dict[str, LayerRanges]] = {spec.name: {} for spec in specs}
    with ExitStack() as hooks, torch.no_grad():
        for spec in specs:
            hooks.enter_context(observing(spec, _recorder(ranges[spec.name])))
        yield ranges


def _run(specs: Sequence[GraphSpec], inputs: Mapping[str, tuple[Inputs, ...]]) -> None:
    for spec in specs:
        for call in inputs[spec.name]:
            spec.module(*call)


def _recorder(ranges: dict[str, LayerRanges]) -> Observer:
    """Return an observer that extends `ranges` by the inputs and outputs of each layer."""

    def observe(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        new = LayerRanges(_range(x), _range(y))
        old = ranges.get(name, new)
        ranges[name] = LayerRanges(old.input | new.input, old.output | new.output)

    return observe


def layer_errors(spec: GraphSpec, calls: Iterable[Inputs], ranges: Mapping[str, LayerRanges]) -> dict[str, float]:
    """Return the sensitivity of each layer: the relative error of its output when only this layer is quantized.

    ‖y_q − y‖² / ‖y‖² over all `calls`. Weights have one scale per output channel, activations one scale per tensor.
    """
    noise: dict[str, float] = dict.fromkeys(ranges, 0.0)
    power: dict[str, float] = dict.fromkeys(ranges, 0.0)

    def observe(name: str, layer: Any, x: Tensor, y: Tensor) -> None:
        if name not in ranges:
            return
        weight = layer.weight
        scales = weight.abs().amax(dim=tuple(range(1, weight.ndim))).clamp_min(torch.finfo(weight.dtype).tiny) / 127
        quantized = torch.fake_quantize_per_channel_affine(
            weight, scales, torch.zeros(len(scales), dtype=torch.int32), 0, -127, 127
        )
        # Functions of torch instead of the layer, whose call would be observed again.
        x = _fake_quantize(x, ranges[name].input)
        if isinstance(layer, nn.Conv2d):
            options: Any = (layer.stride, layer.padding, layer.dilation, layer.groups)
            result = _fake_quantize(nn.functional.conv2d(x, quantized, layer.bias, *options), ranges[name].output)
        else:
            result = nn.functional.linear(x, quantized, layer.bias)
        noise[name] += float((result - y).double().square().sum())
        power[name] += float(y.double().square().sum())

    with observing(spec, observe), torch.no_grad():
        for inputs in calls:
            spec.module(*inputs)
    return {name: noise[name] / max(power[name], np.finfo(float).tiny) for name in ranges}


def multiply_adds(spec: GraphSpec, inputs: Inputs) -> tuple[dict[str, int], int]:
    """Return ({layer: multiply-adds}, multiply-adds of the whole graph including attention) for one call.

    They are counted by the shapes; nothing is computed.
    """
    # torch counts only the fused attention of GPUs.
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
def observing(spec: GraphSpec, observe: Observer) -> Iterator[None]:
    """Call `observe` with the name, module, input and output of each layer whenever it runs in the block."""
    with ExitStack() as hooks:
        for name, module in _layers(spec):

            def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                observe(name, layer, args[0], output)

            hooks.callback(module.register_forward_hook(hook).remove)
        yield


def _range(x: Tensor) -> Range:
    low, high = torch.aminmax(x)
    if not (low.isfinite() and high.isfinite()):
        raise ExportError(
            "the model computes values that are not finite on its own captions. Export an earlier checkpoint, or train "
            "again with a lower learning rate."
        )
    return Range.of(low.item(), high.item())


def _fake_quantize(x: Tensor, span: Range) -> Tensor:
    """Round `x` to the values that its codes can represent."""
    return torch.fake_quantize_per_tensor_affine(x, float(span.scale), int(span.zero_point), 0, 255)
