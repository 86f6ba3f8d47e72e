"""Encode a folder of images in several processes: `python bulk_job.py unidiff|ray SOURCE TARGET WORKERS`.

`unidiff` is a bulk job. `ray` is the pipeline of Ray Data's documentation, with the same encoder in transformers: read
images, encode batches in a pool of actors, and write Parquet files.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

BATCH = 64


class Encode:
    """The stage of the peer that encodes."""

    def __init__(self, clip: str) -> None:
        import torch
        from transformers import CLIPImageProcessor, CLIPModel

        torch.set_num_threads(1)
        self.processor, self.clip = CLIPImageProcessor.from_pretrained(clip), CLIPModel.from_pretrained(clip).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import torch

        pixels = self.processor(list(batch["image"]), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            embeddings = self.clip.visual_projection(self.clip.vision_model(pixels).pooler_output)
        return {"path": batch["path"], "vector": torch.nn.functional.normalize(embeddings, dim=-1).numpy()}


def unidiff(source: Path, target: Path, workers: int) -> None:
    """Index the folder into a new catalog with the built-in bundle."""
    from unidiff_sdk.scale import index

    index(source, target, "tiny", workers=workers, record=target.with_suffix(".jsonl"))


def ray(source: Path, target: Path, workers: int) -> None:
    """Write the embeddings of the folder to Parquet files."""
    import ray as ray_

    from unidiff_sdk.training.checkpoints.checkpoint import TINY

    ray_.init(num_cpus=workers + 2, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray_.data.DataContext.get_current().enable_progress_bars = False
    rows = ray_.data.read_images(str(source), include_paths=True, mode="RGB", file_extensions=["png"])
    pool = ray_.data.ActorPoolStrategy(size=workers)
    arguments = {"clip": str(TINY / "clip")}
    rows = rows.map_batches(Encode, fn_constructor_kwargs=arguments, batch_size=BATCH, compute=pool, num_cpus=1)
    rows.write_parquet(str(target))


if __name__ == "__main__":
    shutil.rmtree(sys.argv[3], ignore_errors=True)
    {"unidiff": unidiff, "ray": ray}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
