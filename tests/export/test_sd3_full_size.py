"""Stable Diffusion 3.5 Medium at the published widths, with random weights.

First two of its 24 layers, one with dual attention, as the first 13 have it, and one without, as the others. Then all
24, where parameters of one shape share their values. The result is that of diffusers' own forward pass. Each stage
runs in a separate process.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

from support.peak_memory import RUN_GRAPH, run_measured
from support.random_sd3 import make_random_sd3

LIMIT = 10e9
EXPORT = """
import sys, torch
from dataclasses import replace
from pathlib import Path
import numpy as np
from diffusers import SD3Transformer2DModel
from support.shared_weights import share_weights
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from unidiff_export.bundle.files import write_graph
from unidiff_export.graphs.lowering import graph_specs, lower
from unidiff_export.options import TARGETS
from unidiff_sdk.training.checkpoints.bases import load_base

base, out, whole = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] == "whole"

def transformer(layers, dual):
    return SD3Transformer2DModel(
        sample_size=128, num_layers=layers, attention_head_dim=64, num_attention_heads=24, joint_attention_dim=4096,
        caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(dual)),
    )

torch.manual_seed(0)
with torch.device("meta"):  # only the exported model has weights
    first = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    model = transformer(24, 13)
if whole:
    model.pos_embed = transformer(1, 1).pos_embed  # its table of positions is no parameter
    share_weights(model)
else:
    model = transformer(2, 1)
checkpoint = replace(load_base(base), unet=model, text_encoder=first)
spec = next(spec for spec in graph_specs(checkpoint) if spec.name == "transformer")
graph = lower(spec, TARGETS["cpu"])
print(sum(node.op_type == "MultiHeadAttention" for node in graph.graph))
write_graph(graph, out, {})
inputs = spec.example(1, 16)  # as many positions as 512 x 512 pixels have
with torch.no_grad():
    results = (checkpoint.unet(
        hidden_states=inputs[0], timestep=inputs[1], encoder_hidden_states=inputs[2], pooled_projections=inputs[3],
        return_dict=False,
    )[0],)  # by diffusers' own forward pass
np.savez(out / "inputs.npz", **{name: x.numpy() for name, x in zip(spec.inputs, inputs)})
np.savez(out / "outputs.npz", **{name: x.numpy() for name, x in zip(spec.outputs, results)})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "attentions"), [("two", 3), ("whole", 37)])
def test_transformer_at_the_published_widths_equals_diffusers(
    tmp_path: Path, layers: str, attentions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_random_sd3(tmp_path / "base")
    (blockwise, *_), exporting = run_measured(EXPORT, base, tmp_path / "transformer", layers)
    (error, *_), running = run_measured(RUN_GRAPH, tmp_path / "transformer")
    with capsys.disabled():
        print(f"\nerror {float(error):.1e}, {exporting / 1e9:.1f} GB to export, {running / 1e9:.1f} GB to run")
    assert float(error) < 1e-4
    # attention over 4,429 tokens at the native size: joint in every layer, and the second one of those with two
    assert int(blockwise) == attentions
    assert max(exporting, running) < LIMIT
