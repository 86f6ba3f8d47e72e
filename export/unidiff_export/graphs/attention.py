"""Attention layers in ONNX: the causal mask as a flag, and ONNX Runtime's own operator where a target asks for it.

The attention nodes of each graph are counted, so that a change in torch's exporter cannot slow a layer down unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript
import torch
from diffusers.models.attention_processor import Attention
from onnx.defs import OpSchema
from onnxscript import opset20 as op
from torch import Tensor, nn
from transformers import AttentionInterface, CLIPTextConfig
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.models.siglip2.modeling_siglip2 import Siglip2Attention
from transformers.models.t5.modeling_t5 import T5Attention

from unidiff_export.options import CONTRIB, Target
from unidiff_sdk.errors import ExportError

from .siglip import AttentionPooling

CAUSAL_BY_FLAG = "unidiff_causal_by_flag"


def attention_layers(module: nn.Module) -> int:
    """Return the number of attention layers that `module` runs in one call."""
    kinds = (Attention, CLIPAttention, SiglipAttention, Siglip2Attention, AttentionPooling, T5Attention)
    return sum(isinstance(layer, kinds) for layer in module.modules())


def count_attention(model: ir.Model, target: Target) -> int:
    """Return the number of attention nodes: the target's operator, or the one of `passes.use_blockwise_attention`."""
    operators = {target.attention, (CONTRIB, "MultiHeadAttention")}
    return sum((node.domain, node.op_type) in operators for node in model.graph)


def check_attention(model: ir.Model, layers: int, target: Target, name: str) -> None:
    """Raise ExportError unless the graph `name` has one attention node for each of the module's `layers`."""
    found = count_attention(model, target)
    if found != layers:
        raise ExportError(
            f"{name} has {layers} attention layers but {found} {target.attention[1]} nodes, so it would run slowly. "
            "Load the model with scaled-dot-product attention (attn_implementation='sdpa' in transformers, "
            "AttnProcessor2_0 in diffusers), and use the torch version of constraints.txt."
        )


@contextmanager
def causal_by_flag(module: nn.Module) -> Iterator[None]:
    """Within the block, let CLIP's text towers in `module` request causal attention instead of computing a mask."""
    configs = {id(c): c for m in module.modules() if isinstance(c := getattr(m, "config", None), CLIPTextConfig)}
    # _attn_implementation is a property over the rest of the config, in both transformers 4.57 and 5.
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation = CAUSAL_BY_FLAG
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention of CLIP's text tower. `mask` is ignored: without padding, the only mask is the causal one."""
    states = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return states.transpose(1, 2), None


# transformers creates no mask for an implementation without a registered mask function.
AttentionInterface.register(CAUSAL_BY_FLAG, _causal_attention)

# The part of the schema that is used here. Only ONNX Runtime itself has the schema:
# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
_MULTI_HEAD_ATTENTION = onnxscript.values.Op(
    onnxscript.values.Opset(CONTRIB, 1),
    "MultiHeadAttention",
    OpSchema(
        "MultiHeadAttention",
        CONTRIB,
        1,
        inputs=[
            *(OpSchema.FormalParameter(name, "T") for name in ("query", "key", "value")),
            *(
                OpSchema.FormalParameter(name, kind, param_option=OpSchema.FormalParameterOption.Optional)
                for name, kind in (("bias", "T"), ("key_padding_mask", "M"), ("attention_bias", "T"))
            ),
        ],
        outputs=[OpSchema.FormalParameter("output", "T")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT),
            OpSchema.Attribute("unidirectional", OpSchema.AttrType.INT),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT),
        ],
    ),
)


def multi_head_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Emit com.microsoft::MultiHeadAttention for scaled_dot_product_attention over [batch, heads, length, width].

    The operator reads and writes [batch, length, heads * width], the layout of the layers around it, so these
    transpositions cancel with theirs. `attn_mask` is added to the scores.
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout or grouped queries")
    heads, width = query.shape[1], query.shape[3]

    def joined(states: Any) -> Any:
        return op.Reshape(op.Transpose(states, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, heads * width]))

    states = _MULTI_HEAD_ATTENTION(
        joined(query),
        joined(key),
        joined(value),
        None,
        None,
        attn_mask,
        num_heads=heads,
        unidirectional=int(is_causal),
        scale=width**-0.5 if scale is None else scale,
    )
    return op.Transpose(op.Reshape(states, op.Constant(value_ints=[0, 0, heads, width])), perm=[0, 2, 1, 3])


def translations(target: Target) -> dict[Callable, Callable]:
    """Return the target's replacements for the exporter's own translations."""
    if target.attention[0] != CONTRIB:
        return {}
    return {torch.ops.aten.scaled_dot_product_attention.default: multi_head_attention}
