"""Stable Diffusion XL at the published widths, with random weights and within 10 GB of memory.

The whole UNet has 2.57 billion parameters, 10.3 GB in float32, and an export holds them more than once. So it is
verified in three parts: all blocks of the whole UNet with one transformer layer each ("unet"), its middle block with
its ten layers ("middle_block"), and the whole UNet at its full depth, where parameters of one shape share their values
("whole_unet"). The second text encoder is complete. Each stage runs in a separate process.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

from support.peak_memory import run_measured
from support.random_sdxl import make_random_sdxl

LIMIT = 10e9
EXPORT = """
import json, sys, torch
from dataclasses import replace
from pathlib import Path
import numpy as np
from diffusers import UNet2DConditionModel
from support.shared_weights import share_weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from unidiff_export.bundle.files import write_graph
from unidiff_export.graphs.lowering import graph_specs, lower
from unidiff_export.options import TARGETS
from unidiff_sdk.training.checkpoints.bases import load_base

base, out, graph = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def unet(layers):
    return conditioned_unet(
        block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), transformer_layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )

def middle_block():
    return conditioned_unet(
        block_out_channels=(1280,), attention_head_dim=(20,), layers_per_block=1, transformer_layers_per_block=(10,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )

def conditioned_unet(**blocks):
    return UNet2DConditionModel(
        sample_size=128, use_linear_projection=True, cross_attention_dim=2048, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816, **blocks,
    )

def whole_unet():
    with torch.device("meta"):
        model = unet((1, 2, 10))
    return share_weights(model)

def second():
    return CLIPTextModelWithProjection(CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu",
        projection_dim=1280, bos_token_id=49406, eos_token_id=49407, pad_token_id=0,
    ))

torch.manual_seed(0)
with torch.device("meta"):  # only the exported model has weights
    first = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12))
    models = {"unet": unet((1, 1, 1)), "text_encoder_2": second()}
    whole = {"unet": unet((1, 2, 10)), "text_encoder_2": models["text_encoder_2"]}
    print(json.dumps({name: sum(p.numel() for p in model.parameters()) for name, model in whole.items()}))
models[graph] = {
    "unet": lambda: unet((1, 1, 1)), "middle_block": middle_block, "whole_unet": whole_unet, "text_encoder_2": second,
}[graph]()
is_unet = graph != "text_encoder_2"
checkpoint = load_base(base)
second_encoder = replace(checkpoint.second, model=models["text_encoder_2"])
checkpoint = replace(checkpoint, unet=models[graph if is_unet else "unet"], text_encoder=first, second=second_encoder)
spec = next(spec for spec in graph_specs(checkpoint) if spec.name == ("unet" if is_unet else graph))
write_graph(lower(spec, TARGETS["portable"]), out, {})
inputs = spec.example(1, 16 if is_unet else 1)  # as many positions as 512 x 512 pixels have
with torch.no_grad():
    results = spec.module(*inputs)
results = results if isinstance(results, tuple) else (results,)
np.savez(out / "inputs.npz", **{name: x.numpy() for name, x in zip(spec.inputs, inputs)})
np.savez(out / "outputs.npz", **{name: x.numpy() for name, x in zip(spec.outputs, results)})
"""
RUN = """
import sys
from pathlib import Path
import numpy as np
from unidiff_sdk.inference.sessions import create_session

out = Path(sys.argv[1])
session = create_session(out / "model.onnx")
results = session.run(dict(np.load(out / "inputs.npz")))
expected = np.load(out / "outputs.npz")
assert set(results) == set(expected)
print(max(np.abs(results[name] - expected[name]).max() / max(1, np.abs(expected[name]).max()) for name in expected))
"""


@pytest.mark.slow
@pytest.mark.parametrize("graph", ["text_encoder_2", "unet", "middle_block", "whole_unet"])
def test_graphs_at_the_published_widths_equal_pytorch(
    tmp_path: Path, graph: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_random_sdxl(tmp_path / "base")
    (counts, *_), exporting = run_measured(EXPORT, base, tmp_path / graph, graph)
    assert json.loads(counts) == {"unet": 2_567_463_684, "text_encoder_2": 694_659_840}, "the published sizes"
    if graph != "whole_unet":  # whose shared weights are stored once
        assert (tmp_path / graph / "model.onnx_data").is_file()
    (error, *_), running = run_measured(RUN, tmp_path / graph)
    with capsys.disabled():
        print(f"\n{graph}: error {float(error):.1e}, {exporting / 1e9:.1f} GB to export, {running / 1e9:.1f} GB to run")
    assert float(error) < 1e-4
    assert max(exporting, running) < LIMIT
