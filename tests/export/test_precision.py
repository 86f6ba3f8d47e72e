"""Storage in half precision is lossless, and overflows of half precision are detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import onnx_ir as ir
import onnxruntime
import torch

from unidiff_export.graphs.lowering import GraphSpec, lower
from unidiff_export.graphs.precision import exact_halves, overflows_half, store_halves


def linear_spec(weight: torch.Tensor) -> GraphSpec:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    module.weight.data = weight
    return GraphSpec(
        "linear", module, 0, {"input": {0: "batch"}}, ("y",), lambda batch, scale: (torch.randn(batch, 64),)
    )


def run(model: ir.Model, file: Path, x: np.ndarray) -> np.ndarray:
    ir.save(model, file)
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"input": x})[0]


def test_store_halves_halves_the_file_without_changing_a_bit(tmp_path: Path) -> None:
    spec = linear_spec(torch.randn(96, 64).half().float())
    x = np.random.default_rng(0).standard_normal((5, 64), dtype=np.float32)
    model = lower(spec)
    before = run(model, tmp_path / "single.onnx", x)
    assert store_halves(model) == 96 * 64 * 2
    after = run(model, tmp_path / "half.onnx", x)
    assert before.dtype == after.dtype == np.float32
    np.testing.assert_array_equal(before, after)
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * (tmp_path / "single.onnx").stat().st_size


def test_exact_halves_refuses_weights_that_half_cannot_represent() -> None:
    weights = np.ones(1000, np.float32)
    assert exact_halves(weights) is not None
    for value in (1 + 2**-12, 1e6, 1e-9, np.nan):
        weights[7] = value
        assert exact_halves(weights) is None


def test_store_halves_keeps_other_weights() -> None:
    model = lower(linear_spec(torch.randn(96, 64)))
    assert store_halves(model) == 0
    assert not [node for node in model.graph if node.op_type == "Cast"]


@pytest.mark.parametrize(("scale", "expected"), [(1.0, False), (1e4, True)])
def test_overflow_inside_a_module_is_detected(scale: float, expected: bool) -> None:
    class Overflow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * scale) * scale / scale**2  # the result itself is small

    assert overflows_half(Overflow(), (torch.ones(4),)) is expected


def test_overflow_inside_attention_is_detected() -> None:
    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x, x, torch.ones_like(x))

    x = torch.ones(1, 2, 8, 64)
    assert overflows_half(Attention(), (100 * x,))  # 100 * 100 * 64 / 8
    assert not overflows_half(Attention(), (10 * x,))


def test_masked_attention_is_not_an_overflow() -> None:
    def attend(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    class Causal(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return attend(x).masked_fill(torch.zeros(1, dtype=torch.bool), float("-inf"))

    assert not overflows_half(Causal(), (torch.randn(1, 2, 8, 16),))
