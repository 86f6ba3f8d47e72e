"""DeepCache (Ma et al. 2023, arXiv:2312.00858): a UNet that computes its deep features at every N-th step only.

Its graphs are lowered as `unidiff-export` lowers a UNet, so their time is that of a real export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from unidiff_export.bundle.files import write_graph
from unidiff_export.graphs.attention import attention_layers
from unidiff_export.graphs.lowering import GraphSpec, graph_specs, lower
from unidiff_export.graphs.timesteps import one_for_each_sample
from unidiff_sdk.inference.sessions import Session

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

OUTPUT, DEEP = "out_sample", "deep_features"


class Layer(NamedTuple):
    """A residual block with what follows it, or a downsampler."""

    block: nn.Module
    attention: nn.Module | None = None
    upsampler: nn.Module | None = None

    def __call__(self, x: Tensor, time: Tensor, states: Tensor) -> Tensor:
        x = self.block(x, time) if hasattr(self.block, "time_emb_proj") else self.block(x)
        if self.attention is not None:
            x = self.attention(x, encoder_hidden_states=states, return_dict=False)[0]
        return x if self.upsampler is None else self.upsampler(x)


class CachedUNet(nn.Module):
    """The layers of a UNet, those below a depth only on demand.

    Args:
        unet: a UNet of Stable Diffusion 1 or 2.
        depth: the number of layers on the way down, besides the first convolution, that run at every step. On the way
            up one more runs. 0 is the paper's fastest branch.
    """

    def __init__(self, unet: UNet2DConditionModel, depth: int) -> None:
        super().__init__()
        self.unet: Any = unet
        self.depth, self.down, self.up = depth, [], []
        for block in self.unet.down_blocks:
            self.down += map(Layer, block.resnets, getattr(block, "attentions", [None] * len(block.resnets)))
            self.down += map(Layer, block.downsamplers or ())
        for block in self.unet.up_blocks:
            self.up += map(Layer, block.resnets, getattr(block, "attentions", [None] * len(block.resnets)))
            self.up[-1] = self.up[-1]._replace(upsampler=block.upsamplers[0] if block.upsamplers else None)
        self.deep_up, self.shallow_up = self.up[: -depth - 1], self.up[-depth - 1 :]

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, deep_features: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the UNet's output; without `deep_features`, also these features, to reuse at the next steps."""
        unet, states = self.unet, encoder_hidden_states
        time = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=one_for_each_sample(timestep, sample)))
        skips = [unet.conv_in(sample)]
        for layer in self.down if deep_features is None else self.down[: self.depth]:
            skips.append(layer(skips[-1], time, states))

        def ascend(layers: Sequence[Layer], x: Tensor) -> Tensor:
            for layer in layers:
                x = layer(torch.cat([x, skips.pop()], dim=1), time, states)
            return x

        deep = deep_features
        if deep is None:
            deep = ascend(self.deep_up, unet.mid_block(skips[-1], time, encoder_hidden_states=states))
        output = unet.conv_out(unet.conv_act(unet.conv_norm_out(ascend(self.shallow_up, deep))))
        return (output, deep) if deep_features is None else (output,)


class CachedSession:
    """A session of the UNet that reuses the deep features of the last complete call.

    One generation at a time may use it, and all its images must take a step together. Its timesteps fall, so one that
    does not starts a generation.

    Args:
        complete, shallow: the graphs without and with deep features as input.
        interval: every so many calls, the first included, are complete.
    """

    def __init__(self, complete: Session, shallow: Session, interval: int) -> None:
        self.inputs, self.outputs = complete.inputs, complete.outputs
        self.providers, self.captured = complete.providers, complete.captured
        self._complete, self._shallow, self._interval = complete, shallow, interval
        self._calls, self._last, self._deep = 0, 0.0, {}

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Return the UNet's output, whatever `outputs` names."""
        timestep = float(feeds["timestep"][0])
        self._calls = self._calls + 1 if timestep < self._last else 0
        self._last = timestep
        if self._calls % self._interval == 0:
            results = self._complete.run(feeds, [OUTPUT, DEEP])
            self._deep = {DEEP: results.pop(DEEP)}
            return results
        feeds = {name: array for name, array in {**feeds, **self._deep}.items() if name in self._shallow.inputs}
        return self._shallow.run(feeds, [OUTPUT])


def write_graphs(checkpoint: Checkpoint, depth: int, folder: Path) -> tuple[Path, Path]:
    """Write the complete graph and the shallow one, unless `folder` has them; return their files."""
    spec = next(spec for spec in graph_specs(checkpoint) if spec.name == "unet")
    module = CachedUNet(checkpoint.unet, depth).eval()
    attention = [layer.attention for layer in (*module.down[:depth], *module.shallow_up)]
    shallow_attention = sum(attention_layers(layer) for layer in attention if layer is not None)

    def example(batch: int, scale: int) -> tuple[Tensor, ...]:
        arguments = spec.example(batch, scale)
        return (*arguments, module(*arguments)[1])

    side = torch.export.Dim.AUTO  # that of the latents, divided by a power of two
    inputs: dict[str, Any] = {**spec.inputs, DEEP: {0: "batch", 2: side, 3: side}}
    files = []
    for name, graph in {
        "complete": GraphSpec("unet", module, spec.attention_layers, spec.inputs, (OUTPUT, DEEP), spec.example),
        "shallow": GraphSpec("unet", module, shallow_attention, inputs, (OUTPUT,), example),
    }.items():
        files.append(folder / name / "model.onnx")
        if not files[-1].is_file():
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            write_graph(lower(graph), files[-1].parent, {})
    return files[0], files[1]


class Work(NamedTuple):
    """Multiply-adds of one sample: of a UNet's call, of its shallow call, and of its self-attention."""

    complete: int
    shallow: int
    self_attention: int


def count_work(config: Mapping[str, Any], side: int, tokens: int, depth: int) -> Work:
    """Count by the shapes alone.

    Args:
        config: arguments of diffusers' UNet2DConditionModel.
        side: of the latents.
        tokens: number of token states.
    """
    from diffusers import UNet2DConditionModel

    with torch.device("meta"), torch.inference_mode():
        unet: Any = UNet2DConditionModel.from_config(dict(config)).eval()
        inputs = (
            torch.empty(1, unet.config.in_channels, side, side),
            torch.empty(1),
            torch.empty(1, tokens, unet.config.cross_attention_dim),
        )
        with FlopCounterMode(display=False) as whole:
            unet(*inputs)
        module = CachedUNet(unet, depth)
        _, deep = module(*inputs)
        with FlopCounterMode(display=False) as shallow:
            module(*inputs, deep)
    layers = {name: sum(counts.values()) for name, counts in whole.get_flop_counts().items()}
    attention = sum(count for name, count in layers.items() if name.endswith(".attn1"))
    return Work(*(count // 2 for count in (whole.get_total_flops(), shallow.get_total_flops(), attention)))
