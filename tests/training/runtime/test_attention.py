"""Attention in float32 against PyTorch's own attention, in values, gradients and inputs that it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402
from unidiff_sdk.training.runtime.attention import ShortAttentionInFloat32  # noqa: E402


class Recorded(TorchFunctionMode):
    """Records the type of the queries of each attention."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def tensors(tokens: int = 20, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, tokens, 28, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "half"}])
def test_values_and_gradients_are_those_of_float32(dtype: torch.dtype, options: dict[str, Any]) -> None:
    kind = options.get("mask")
    mask = torch.ones(20, 20).tril() if kind else None
    masks = {"bool": [mask.bool()] * 2, "half": [mask.to(dtype), mask]}[kind] if mask is not None else [None, None]
    options = {name: value for name, value in options.items() if name != "mask"}
    half, full = tensors(dtype=dtype), [each.detach().float().requires_grad_() for each in tensors(dtype=dtype)]
    with Recorded() as recorded, ShortAttentionInFloat32():
        ours = F.scaled_dot_product_attention(*half, attn_mask=masks[0], **options)
    expected = F.scaled_dot_product_attention(*full, attn_mask=masks[1], **options)
    assert recorded.dtypes == [torch.float32] and ours.dtype == dtype
    torch.testing.assert_close(ours, expected.to(dtype), rtol=0, atol=0)
    ours.float().square().sum().backward()
    expected.to(dtype).float().square().sum().backward()
    for mine, other in zip(half, full, strict=True):
        torch.testing.assert_close(mine.grad, other.grad.to(dtype), rtol=0, atol=0)


def test_stays_in_half_precision_over_many_tokens_and_outside_the_block() -> None:
    with Recorded() as recorded:
        with ShortAttentionInFloat32():
            F.scaled_dot_product_attention(*tensors(512))
            F.scaled_dot_product_attention(*tensors(513))
        F.scaled_dot_product_attention(*tensors())
    assert recorded.dtypes == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_autocast_does_not_undo_it() -> None:
    weight, states = torch.randn(28, 28, requires_grad=True), tensors(dtype=torch.float32)[0]
    with Recorded() as recorded, ShortAttentionInFloat32(), torch.autocast("cpu", torch.bfloat16):
        projected = states @ weight
        output = F.scaled_dot_product_attention(projected, projected, projected)
        output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and recorded.dtypes == [torch.float32]
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, torch.float32), ({"checkpoint_activations": True}, torch.bfloat16)],
    ids=["default", "checkpointing"],
)
def test_training_in_half_precision_attends_in(
    small_catalog: Path, random_checkpoint: Path, tmp_path: Path, options: dict[str, Any], expected: torch.dtype
) -> None:
    config = TrainingConfig(steps=1, batch_size=4, precision="bf16", **options)
    with Recorded() as recorded:
        train(small_catalog, random_checkpoint, tmp_path / "tuned", config, device="cpu")
    towers, unet = 2 + 2, 4 * 2  # layers; transformer blocks with two attentions each
    assert recorded.dtypes.count(expected) >= towers + unet
    assert expected == torch.bfloat16 or torch.bfloat16 not in recorded.dtypes
