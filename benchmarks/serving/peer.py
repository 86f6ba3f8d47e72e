"""The server that an application team writes by hand: `python peer.py PRODUCTS`.

FastAPI with CLIP of transformers, the pipeline of diffusers, and a matrix product over all embeddings. The weights,
the sampler, the steps and the answers are those of `unidiff serve`. FastAPI runs both functions in threads. The
pipeline keeps state, so a lock lets one request after the other use it.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel
from transformers import CLIPModel, CLIPTokenizerFast

from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

GUIDANCE = 5.0


class Search(BaseModel):
    """A query."""

    text: str
    limit: int = 12


class Generate(BaseModel):
    """A prompt."""

    prompt: str
    n: int = 1
    steps: int = 20
    seed: int = 0


def create_app(products: Path) -> FastAPI:
    """Load the models and embed the products."""
    folder = load_checkpoint("tiny").path
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "clip")
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    rows = [json.loads(line) for line in (products / "metadata.jsonl").read_text().splitlines()]
    embeddings = embed(clip, folder, [products / row["file_name"] for row in rows])
    app, generating = FastAPI(), threading.Lock()

    @app.post("/v1/search")
    def search(query: Search) -> dict[str, Any]:
        with torch.inference_mode():
            tokens = tokenizer(query.text, return_tensors="pt", truncation=True)
            vector = unit(features_of(clip.get_text_features(**tokens)))
            scores, best = (embeddings @ vector[0]).topk(min(query.limit, len(rows)))
        return {
            "hits": [
                {"id": rows[k]["file_name"], "score": score, "text": rows[k]["text"], "columns": rows[k]}
                for score, k in zip(scores.tolist(), best.tolist(), strict=True)
            ]
        }

    @app.post("/v1/generate")
    def generate(request: Generate) -> dict[str, Any]:
        with generating:
            images = pipeline(
                request.prompt,
                num_images_per_prompt=request.n,
                num_inference_steps=request.steps,
                guidance_scale=GUIDANCE,
                generator=torch.Generator().manual_seed(request.seed),
            ).images
        return {"images": [{"image": png(image), "seed": request.seed} for image in images]}

    return app


def embed(clip: Any, folder: Path, files: list[Path]) -> torch.Tensor:
    """Unit embeddings of images: float32[images, dim]."""
    from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder / "clip")
    batches = []
    with torch.inference_mode():
        for start in range(0, len(files), 64):
            images = [Image.open(file).convert("RGB") for file in files[start : start + 64]]
            pixels = processor(images, return_tensors="pt")
            batches.append(unit(features_of(clip.get_image_features(**pixels))))
    return torch.cat(batches)


def features_of(output: Any) -> torch.Tensor:
    """The projected features; newer versions of transformers return them in an object."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def png(image: Image.Image) -> str:
    """A PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Announcing(uvicorn.Server):
    """Prints its address once it listens."""

    async def startup(self, sockets: Any = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        print(f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}", flush=True)


if __name__ == "__main__":
    Announcing(uvicorn.Config(create_app(Path(sys.argv[1])), port=0, log_level="warning")).run()
