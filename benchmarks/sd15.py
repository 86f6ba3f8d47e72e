"""Models of public architectures with random weights: `python sd15.py CACHE MODEL [GRAPH]`.

MODEL is "sd15" (Stable Diffusion 1.5 with CLIP ViT-L/14) or "vit-b-32" (that CLIP alone). The time, memory and size of
a graph depend only on its architecture. With random weights there is no quality to verify, so the graphs are made here
by the exporter's lowering and quantization, without its verification.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from provenance import digest

VOCABULARY = 49408
# Recorded in the checkpoint, so that unidiff-export can calibrate int8 with them.
CAPTIONS = ("a red striped dress", "purple dotted boots", "a blue plaid shirt", "a plain teal mug")

# https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5: unet/config.json, vae/config.json
UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
VAE = {
    "sample_size": 512,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
# (hidden size, layers) of the text tower and of the vision tower, patch size, embedding dimension
CLIPS = {"sd15": ((768, 12), (1024, 24), 14, 768), "vit-b-32": ((512, 12), (768, 12), 32, 512)}

GENERATION = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}  # graph: folder of its model


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@click.argument("model", type=click.Choice(list(CLIPS)))
@click.argument("graph", required=False)
def main(cache: Path, model: str, graph: str | None) -> None:
    """Write the checkpoint CACHE/MODEL, and its GRAPH in fp32 and int8, unless this code has already written them."""
    if not (cache / model).is_dir():
        write_checkpoint(cache / model, model)
    if graph:
        stamp, code = graph_file(cache, model, graph, "int8").with_name("made-by"), digest([Path(__file__)])
        if not stamp.is_file() or stamp.read_text() != code:
            write_graphs(cache, model, graph)
            stamp.write_text(code)


def graph_file(cache: Path, model: str, graph: str, precision: str) -> Path:
    """Return the path of a graph in the cache."""
    return cache / f"{model}-{precision}" / graph / "model.onnx"


def pipeline(cache: Path, precision: str) -> Path:
    """Return a folder with the graphs of generation and the other files of a diffusers pipeline; export missing graphs.

    The folder has no manifest, because nothing was verified. `Bundle` opens it like the export of another tool.
    """
    folder, checkpoint = cache / f"sd15-{precision}", cache / "sd15"
    for graph in GENERATION:
        # In a separate process, which releases its memory.
        subprocess.run([sys.executable, __file__, cache, "sd15", graph], check=True)
    write_pipeline_files(folder, checkpoint)
    return folder


def write_pipeline_files(folder: Path, checkpoint: Path) -> None:
    """Copy the other files of a diffusers pipeline next to its graphs."""
    for graph, part in GENERATION.items():
        shutil.copy(checkpoint / part / "config.json", folder / graph)
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(checkpoint / name, folder / name, dirs_exist_ok=True)
    shutil.copy(checkpoint / "model_index.json", folder)


def write_checkpoint(folder: Path, model: str) -> None:
    """Write a checkpoint; for a CLIP alone, write its folder."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel

    from unidiff_sdk.training.checkpoints.checkpoint import ImageProcessor
    from unidiff_sdk.training.checkpoints.saving import save_checkpoint

    torch.manual_seed(0)
    clip = CLIPModel(clip_config(*CLIPS[model]))
    if model != "sd15":
        clip.save_pretrained(folder / "clip")
        return
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    save_checkpoint(
        folder,
        unet=UNet2DConditionModel(**UNET),
        vae=AutoencoderKL(**VAE),
        clip=clip,
        text_encoder=text_encoder,
        tokenizer=tokenizer(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        image_processor=ImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
        meta={"name": "sd15-random", "captions": list(CAPTIONS), "synthetic": True},
        dtype=torch.float16,
    )


def clip_config(text: tuple[int, int], vision: tuple[int, int], patch: int, width: int) -> Any:
    """Return a CLIPConfig with 64 channels per head, for images of 224 pixels and 77 tokens."""
    from transformers import CLIPConfig

    def tower(size: int, layers: int) -> dict[str, int]:
        return {
            "hidden_size": size,
            "intermediate_size": 4 * size,
            "num_hidden_layers": layers,
            "num_attention_heads": size // 64,
            "projection_dim": width,
        }

    special = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}
    return CLIPConfig(
        projection_dim=width,
        text_config=tower(*text) | special | {"vocab_size": VOCABULARY, "max_position_embeddings": 77},
        vision_config=tower(*vision) | {"image_size": 224, "patch_size": patch},
    )


def tokenizer() -> Any:
    """Return a tokenizer with the conventions and the size of CLIP's whose vocabulary holds single bytes only."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    filling = [f"<{number}>" for number in range(VOCABULARY - 2 - len(symbols))]
    entries = [*symbols, *filling, "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(entries)}), "utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n", "utf-8")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def write_graphs(cache: Path, model: str, graph: str) -> None:
    """Lower a graph as unidiff-export does, and quantize all its layers over the ranges of one random call."""
    import torch
    from unet_peer import inputs

    from unidiff_export.bundle.files import write_graph
    from unidiff_export.graphs.lowering import lower
    from unidiff_export.quantization.calibration import observing
    from unidiff_export.quantization.qdq import LayerRanges, Range, quantize

    folders = [graph_file(cache, model, graph, precision).parent for precision in ("fp32", "int8")]
    for folder in folders:
        folder.parent.mkdir(parents=True, exist_ok=True)
    spec = graph_spec(cache / model, model, graph)
    lowered = lower(spec)
    write_graph(lowered.clone(), folders[0], {})
    ranges: dict[str, LayerRanges] = {}

    def observe(name: str, layer: Any, x: Any, y: Any) -> None:
        ranges[name] = LayerRanges(*(Range.of(z.min().item(), z.max().item()) for z in (x, y)))

    with observing(spec, observe), torch.no_grad():
        spec.module(*map(torch.from_numpy, inputs(graph, 1, 32).values()))
    quantize(lowered, ranges, contrib=True)
    write_graph(lowered, folders[1], {})


def graph_spec(folder: Path, model: str, graph: str) -> Any:
    """Return the exporter's specification of a graph; for a CLIP alone, one of its towers."""
    import torch
    from transformers import CLIPModel
    from unet_peer import inputs

    from unidiff_export.graphs.attention import attention_layers
    from unidiff_export.graphs.lowering import GraphSpec, ImageEncoder, TextEmbedder, graph_specs
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    if model == "sd15":
        return next(spec for spec in graph_specs(load_checkpoint(folder)) if spec.name == graph)
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    tower = ImageEncoder(clip) if graph == "image_encoder" else TextEmbedder(clip)
    input_name, axes, output = {
        "image_encoder": ("pixel_values", {0: "batch"}, "image_embeds"),
        "text_encoder": ("input_ids", {0: "batch", 1: "tokens"}, "text_embeds"),
    }[graph]

    def example(batch: int, scale: int) -> tuple[Any, ...]:
        return tuple(map(torch.from_numpy, inputs(graph, batch, 0).values()))

    return GraphSpec(graph, tower.eval(), attention_layers(tower), {input_name: axes}, (output,), example)


if __name__ == "__main__":
    main()
