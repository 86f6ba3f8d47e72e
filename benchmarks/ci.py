"""A short performance gate: the runtime must stay faster than PyTorch with the same tiny model on one thread.

The gate compares ratios (UniDiff / PyTorch, smaller is better) of processor time, and both take turns, so that the
speed and the load of the machine do not matter. `bounds.json` holds the bounds and the margin by which a ratio may
exceed its bound. A ratio above that fails the gate only if a second measurement confirms it.
"""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from harness import measure, spread

BOUNDS = Path(__file__).with_name("bounds.json")
ITEMS = 256

Case = tuple[Callable[[], object], Callable[[], object], int]  # UniDiff, PyTorch, rounds


def main() -> None:
    """Measure every case, print the ratios, and exit with 1 if one exceeds its bound twice."""
    gate = json.loads(BOUNDS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shop.catalog"
        fill(folder)
        copy = Path(shutil.copytree(folder, Path(temporary) / "copy.catalog"))  # a catalog allows one process at a time
        cases = {"process start to first hit": processes(folder), **in_process(copy)}
        failed = over(gate["bounds"], gate["margin"], lambda name: ratio_of(name, cases[name]))
    if failed:
        sys.exit(
            f"Above the bound twice: {', '.join(failed)}. If the change is intended, raise the bound in {BOUNDS.name} "
            "and give the reason in the commit message."
        )


def over(bounds: Mapping[str, float], margin: float, ratio: Callable[[str], float]) -> list[str]:
    """Return the cases with a ratio above bound · (1 + margin) twice; the second measurement follows all first ones."""

    def exceeds(name: str) -> bool:
        value, limit = ratio(name), bounds[name] * (1 + margin)
        verdict = "ok" if value <= limit else "OVER"
        print(f"{name}: ratio {value:.2f} (bound {bounds[name]:.2f}, with margin {limit:.2f}) {verdict}", flush=True)
        return not value <= limit  # true for NaN

    once = [name for name in bounds if exceeds(name)]
    return [name for name in once if exceeds(name)]


def ratio_of(name: str, case: Case) -> float:
    """Return the median over the rounds of UniDiff's processor time divided by PyTorch's."""
    ours, peer, rounds = case
    samples = measure({"UniDiff": ours, "PyTorch": peer}, rounds, clock=processor_time)
    medians = ", ".join(f"{who} {1000 * spread(column)['median']:.2f} ms" for who, column in samples.items())
    print(f"{name}: {medians}", flush=True)
    return spread([a / b for a, b in zip(samples["UniDiff"], samples["PyTorch"], strict=True)])["median"]


def processor_time() -> float:
    """Return the processor time so far, in seconds, of this process and of its finished children."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def fill(folder: Path) -> None:
    """Write a small catalog of synthetic products."""
    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render

    chosen = products("ecommerce-product", ITEMS, seed=2)
    with Catalog(folder) as catalog:
        catalog.add(
            [render(product) for product in chosen],
            texts=[product.caption for product in chosen],
            payloads=[{"catalog": product.catalog} for product in chosen],
        )


def processes(folder: Path) -> Case:
    """Compare the time of a new process to its first hit with that of a process that only imports PyTorch and CLIP."""
    search = f"from unidiff_sdk import Catalog; assert Catalog({str(folder)!r}).search('a red mug')"

    def new_process(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return new_process(search), new_process("import torch; from transformers import CLIPModel, CLIPTokenizer"), 3


def in_process(folder: Path) -> dict[str, Case]:
    """Compare a text search and a call of each graph with eager PyTorch and the weights behind the bundle."""
    import numpy as np
    import torch

    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    torch.set_num_threads(1)
    bundle = Bundle.open("tiny", threads=1)
    checkpoint = load_checkpoint("tiny")
    catalog = Catalog(folder, bundle=bundle)
    clip, unet, vae = checkpoint.clip, checkpoint.unet, checkpoint.vae
    normal = np.random.default_rng(0).standard_normal
    gallery = normal((ITEMS, bundle.dim)).astype(np.float32)
    # Never the same text twice: the catalog caches embeddings of texts.
    queries, queries_in_torch = ((f"a tall red mug, {i}" for i in itertools.count()) for _ in range(2))

    def search_in_torch() -> object:
        tokens = checkpoint.tokenizer(
            [next(queries_in_torch)], padding="max_length", return_tensors="pt", truncation=True
        )
        pooled = clip.text_model(input_ids=tokens["input_ids"]).pooler_output
        embedding = torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)
        return np.argsort(-(gallery @ embedding[0].numpy()))[:10]

    def against_pytorch(graph: str, act: Callable[..., object], **arrays: np.ndarray) -> Case:
        feed = {name: array.astype(np.float32) for name, array in arrays.items()}
        tensors = [torch.from_numpy(array) for array in feed.values()]
        session = bundle.session(graph)
        return lambda: session.run(feed), inference(lambda: act(*tensors)), 40

    def inference(act: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(act)

    # The UNet computes two samples: one image with guidance.
    side, channels = unet.config.sample_size, unet.config.in_channels
    states = normal((2, bundle.max_tokens, unet.config.cross_attention_dim))
    return {
        "encode and search a text": (lambda: catalog.search(next(queries)), inference(search_in_torch), 40),
        "encode eight images": against_pytorch(
            "image_encoder",
            lambda pixels: clip.visual_projection(clip.vision_model(pixels).pooler_output),
            pixel_values=normal((8, 3, bundle.image_size, bundle.image_size)),
        ),
        "one denoising step": against_pytorch(
            "unet",
            lambda z, t, conditions: unet(z, t, conditions).sample,
            sample=normal((2, channels, side, side)),
            timestep=np.array([500.0, 500.0]),
            encoder_hidden_states=states,
        ),
        "decode an image": against_pytorch(
            "vae_decoder", lambda z: vae.decode(z).sample, latent_sample=normal((1, channels, side, side))
        ),
    }


if __name__ == "__main__":
    main()
