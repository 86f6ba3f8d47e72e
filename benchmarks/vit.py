"""A bundle whose image encoder has the architecture of CLIP's ViT-B/32 with random weights: for speed, not for hits.

It is exported once, from the built-in checkpoint with such a CLIP instead of its own, and cached under `.cache/vit`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

CACHE = ROOT / ".cache" / "vit"
SIZE, PATCH, DIM = 224, 32, 512


def vit_checkpoint() -> Checkpoint:
    """Return the checkpoint; its weights are the same each time."""
    import torch
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    from unidiff_sdk.training.checkpoints.checkpoint import TINY, ImageProcessor, assemble_checkpoint, load_checkpoint

    tiny = load_checkpoint("tiny").clip
    vision = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=DIM,
    )
    config = CLIPConfig(
        text_config=tiny.config.text_config.to_dict(), vision_config=vision.to_dict(), projection_dim=DIM
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(config).eval()
    clip.text_model.load_state_dict(tiny.text_model.state_dict())
    processor = ImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return assemble_checkpoint(TINY, clip, processor)


def vit_bundle(checkpoint: Checkpoint, precision: str) -> Path:
    """Return the folder of its bundle; export it if it is not in the cache."""
    from unidiff_export.exporter import export_bundle

    folder = CACHE / precision
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        export_bundle(checkpoint, folder, precision=precision)
    return folder
