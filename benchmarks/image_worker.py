"""Generate one image per call: `image_worker.py ENGINE FOLDER STEPS GUIDANCE THREADS`.

ENGINE is a key of ENGINES. FOLDER is a bundle for UniDiff and a checkpoint for diffusers. All use 256 x 256 pixels, the
same prompt and DDIM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from _worker import serve

PROMPT, SIDE = "a red striped dress", 256


def unidiff(folder: str, steps: int, guidance: float, threads: int, **engine: str) -> Callable[[], object]:
    from unidiff_sdk import Bundle
    from unidiff_sdk.generation.generator import Generator

    generator = Generator(Bundle.open(folder, threads=threads, verify=False, **engine))
    settings: dict[str, Any] = {"steps": steps, "guidance_scale": guidance, "sampler": "ddim"}
    return lambda: generator.generate(PROMPT, width=SIDE, height=SIDE, **settings)


def diffusers(folder: str, steps: int, guidance: float, threads: int, dtype: str = "float32") -> Callable[[], object]:
    import torch
    from diffusers import StableDiffusionPipeline

    torch.set_num_threads(threads)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance}
    return lambda: pipeline(PROMPT, width=SIDE, height=SIDE, **settings).images


ENGINES: dict[str, Callable[[str, int, float, int], Callable[[], object]]] = {
    "unidiff": unidiff,
    "unidiff-openvino-bf16": partial(unidiff, device="openvino", precision="bf16"),
    "diffusers": diffusers,
    "diffusers-bf16": partial(diffusers, dtype="bfloat16"),
}

if __name__ == "__main__":
    engine, folder, steps, guidance, threads = sys.argv[1:]
    serve(ENGINES[engine](folder, int(steps), float(guidance), int(threads)))
