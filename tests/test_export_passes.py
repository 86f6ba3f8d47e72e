"""Rewritten graphs compute what PyTorch computes, by the operators that were meant."""

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
from torch import Tensor, nn

from unidiff_export.lowering import GraphSpec, lower
from unidiff_export.options import TARGETS


class Norm(nn.Module):
    """Group norm of a tensor whose values stand far from zero, where a variance in one pass would lose its digits."""

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
    """The product is wanted whole as well: cutting its weights would compute it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        a, b = y.chunk(2, dim=-1)
        return torch.cat([a * b, y], dim=-1)


class OtherAxis(nn.Module):
    """Cut along the positions, not the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.linear(x).chunk(2, dim=1)
        return a * b


def lowered(module: nn.Module, x: Tensor, axes: dict[int, str], target: str = "cpu") -> ir.Model:
    spec = GraphSpec("module", module, 0, {"x": axes}, ("y",), lambda b, s: (x[:b],))
    return lower(spec, TARGETS[target])


def assert_same(model: ir.Model, module: nn.Module, *calls: Tensor) -> None:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    for x in calls:
        with torch.no_grad():
            np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], module(x), rtol=1e-5, atol=1e-4)


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("shape", [(3, 12, 5, 7), (2, 12, 9)])
def test_group_norm(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, module = torch.randn(shape) + 50, Norm().eval()
    axes = {0: "batch"} | {axis: f"side{axis}" for axis in range(2, len(shape))}
    model = lowered(module, x, axes)
    found = operators(model)
    assert found["InstanceNormalization"] == 1 and "GroupNormalization" not in found
    assert_same(model, module, x, torch.randn(5, 12, *[side + 3 for side in shape[2:]]))
    assert operators(lowered(module, x, axes, "portable"))["GroupNormalization"] == 1


def test_weights_of_a_gated_layer_are_cut() -> None:
    torch.manual_seed(0)
    x, module = torch.randn(3, 5, 6), Gated().eval()
    model = lowered(module, x, {0: "batch"})
    assert "Split" not in operators(model) and operators(model)["MatMul"] == 4
    # The layer's name stays with its parts, by which int8 finds what they see.
    assert [node.name.rpartition("/")[0] for node in model.graph if node.op_type == "MatMul"] == [
        "first.proj",
        "first.proj",
        "second.proj",
        "second.proj",
    ]
    assert_same(model, module, x, torch.randn(7, 5, 6))
    assert operators(lowered(module, x, {0: "batch"}, "portable"))["Split"] == 2


@pytest.mark.parametrize("module", [Reused(), OtherAxis()])
def test_other_splits_stay(module: nn.Module) -> None:
    x = torch.randn(3, 4, 6)
    model = lowered(module.eval(), x, {0: "batch"})
    assert operators(model)["Split"] == 1 and operators(model)["MatMul"] == 1
    assert_same(model, module, x)
