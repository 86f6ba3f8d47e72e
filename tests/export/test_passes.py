"""Graphs after the passes agree with PyTorch and consist of the intended operators."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import onnx_ir as ir
import onnxruntime
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import Downsample2D, ResnetBlock2D, Upsample2D
from onnx.reference import ReferenceEvaluator
from support.contribops import CONTRIB_OPS
from torch import Tensor, nn

from unidiff_export.graphs.lowering import GraphSpec, lower
from unidiff_export.graphs.passes import MANY_KEYS, rewrite_for_cuda
from unidiff_export.options import TARGETS


class Norm(nn.Module):
    """Group norm of values far from zero, for which a one-pass variance would lose its digits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, 12, eps=1e-6)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) * 2


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GEGLU(6, 10), GEGLU(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Reused(nn.Module):
    """The whole product is used as well, so splitting its weights would compute it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * b, y], dim=-1)


class OtherAxis(nn.Module):
    """A split along the positions instead of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear(x).chunk(2, dim=1)
        return a * b


class Attentive(nn.Module):
    """Attention over pixels, as in a VAE."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(8, heads=2, dim_head=4, residual_connection=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


class Activated(nn.Module):
    """Group norms followed by SiLU, without SiLU, and with SiLU if the norm's result is also used directly."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels, eps=1e-4) for _ in range(3))
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[1](nn.functional.silu(self.norms[0](x)))
        y = self.norms[2](x)
        return nn.functional.silu(y) + y


class Block(nn.Module):
    """The parts of a UNet: residual block, downsampling, attention over pixels, upsampling, skip connection, scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.residual = ResnetBlock2D(in_channels=8, out_channels=16, temb_channels=None, groups=4)
        self.down, self.up = Downsample2D(16, use_conv=True), Upsample2D(16, use_conv=True)
        self.attention = Attention(16, heads=2, dim_head=8)
        self.last = nn.Conv2d(24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.residual(x.to(self.last.weight.dtype), None) / 2.0)
        batch, channels, height, width = y.shape
        states = self.attention(y.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
        y = states.reshape(batch, height, width, channels).permute(0, 3, 1, 2) + y
        return self.last(torch.cat([self.up(y), x.to(y.dtype)], dim=1)).float()


def lowered(
    module: nn.Module, x: Tensor, axes: dict[int, str], target: str = "cpu", attention: int = 0, half: bool = False
) -> ir.Model:
    sizes = {"side2": 32, "side3": MANY_KEYS // 32}
    spec = GraphSpec("module", module, attention, {"x": axes}, ("y",), lambda b, s: (x[:b],), sizes)
    return lower(spec, TARGETS[target], half=half)


def assert_same(model: ir.Model, module: nn.Module, *calls: Tensor) -> None:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for x in calls:
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], module(x), rtol=1e-5, atol=1e-4)


def assert_same_by_definition(model: ir.Model, module: nn.Module, x: Tensor, atol: float) -> None:
    """Like `assert_same`, for operators without a CPU kernel in ONNX Runtime."""
    (ours,) = ReferenceEvaluator(ir.to_proto(model), new_ops=CONTRIB_OPS).run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(ours, module(x), atol=atol)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 12, 9)])
def test_group_norm_becomes_instance_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(shape) + 50, Norm().eval()
    axes = {0: "batch"} | {axis: f"side{axis}" for axis in range(2, len(shape))}
    model = lowered(module, x, axes)
    found = operators(model)
    assert found["InstanceNormalization"] == 1 and "GroupNormalization" not in found
    assert_same(model, module, x, torch.randn(5, 12, *[side + 3 for side in shape[2:]]))
    assert operators(lowered(module, x, axes, "portable"))["GroupNormalization"] == 1


def test_weights_of_a_gated_layer_are_split() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(3, 5, 6), Gated().eval()
    model = lowered(module, x, {0: "batch"})
    assert "Split" not in operators(model) and operators(model)["MatMul"] == 4
    # The parts keep the layer's name, which int8 needs to find their ranges.
    assert [node.name.rpartition("/")[0] for node in model.graph if node.op_type == "MatMul"] == [
        "first.proj",
        "first.proj",
        "second.proj",
        "second.proj",
    ]
    assert_same(model, module, x, torch.randn(7, 5, 6))
    assert operators(lowered(module, x, {0: "batch"}, "portable"))["Split"] == 2


@pytest.mark.parametrize("module", [Reused(), OtherAxis()])
def test_other_splits_are_kept(module: nn.Module) -> None:
    x = torch.randn(3, 4, 6)
    model = lowered(module.eval(), x, {0: "batch"})
    assert operators(model)["Split"] == 1 and operators(model)["MatMul"] == 1
    assert_same(model, module, x)


def test_attention_over_many_keys_becomes_blockwise() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(2, 8, 6, 5), Attentive().eval()
    model = lowered(module, x, {0: "batch", 2: "side2", 3: "side3"}, attention=1)
    assert operators(model)["MultiHeadAttention"] == 1 and "Attention" not in operators(model)
    assert_same(model, module, x, torch.randn(3, 8, 40, 30))
    for axes in ({0: "batch"}, {0: "batch", 2: "side2"}):  # few keys
        model = lowered(module, x, axes, attention=1)
        assert operators(model)["Attention"] == 1 and "MultiHeadAttention" not in operators(model)
        assert_same(model, module, x)


@pytest.mark.parametrize("half", [False, True])
def test_group_norm_for_cuda_fuses_silu(half: bool) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(3, 16, 5, 7), Activated(16).eval()
    model = lowered(module, x, {0: "batch", 2: "side2", 3: "side3"}, "cuda", half=half)
    assert rewrite_for_cuda(model) and not rewrite_for_cuda(model)
    found = operators(model)
    assert found["GroupNorm"] == 3 and "GroupNormalization" not in found and found["Sigmoid"] == 1
    fused = [node.attributes["activation"].as_int() for node in model.graph if node.op_type == "GroupNorm"]
    assert fused == [1, 0, 0]
    assert_same_by_definition(model, module, x, atol=2e-2 if half else 1e-5)


@pytest.mark.parametrize("half", [False, True])
def test_feature_maps_for_cuda_stay_channels_last(half: bool) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(2, 8, 6, 8), Block().eval()
    model = lowered(module, x, {0: "batch", 2: "side2", 3: "side3"}, "cuda", attention=1, half=half)
    assert rewrite_for_cuda(model)
    found = operators(model)
    assert found["NhwcConv"] == 6 and not {"Conv", "GroupNormalization"} & set(found)
    transposed = [node.inputs[0] for node in model.graph if node.op_type == "Transpose"]
    feature_maps = [value for value in transposed if not value.is_initializer()]
    # Only the input and the output are transposed; attention has the layout already.
    assert len(feature_maps) == 2
    assert_same_by_definition(model, module, x, atol=2e-2 if half else 1e-4)
    assert_same_by_definition(model, module, torch.randn(3, 8, 8, 10), atol=2e-2 if half else 1e-4)


@pytest.mark.parametrize(("channels", "shape"), [(12, (3, 12, 5, 7)), (16, (2, 16, 9)), (1032, (2, 1032, 3, 3))])
def test_group_norms_without_a_cuda_kernel_are_kept(channels: int, shape: tuple[int, ...]) -> None:
    """An odd number of channels per group, another rank, and groups that are too large."""
    torch.manual_seed(0)
    x, module = torch.randn(shape), Activated(channels).eval()
    model = lowered(module, x, {0: "batch"}, "cuda")
    assert not rewrite_for_cuda(model)
    assert operators(model)["GroupNormalization"] == 3
    assert_same(model, module, x)
