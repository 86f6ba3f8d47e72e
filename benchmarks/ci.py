"""A short gate: the runtime must stay ahead of PyTorch on the same tiny model, in the same run, on one thread.

Only ratios are compared (ours / PyTorch's, smaller is better), ours and theirs taking turns, and of processor time
instead of the clock's, so that a slow or busy machine decides nothing. The bounds are in `bounds.json`, with the margin
by which one may be exceeded; what is over it is measured once more before it counts.
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

Case = tuple[Callable[[], object], Callable[[], object], int]  # ours, the peer, rounds


def main() -> None:
    """Measure every case, print the ratios, and exit with 1 if one is over its bound twice."""
    gate = json.loads(BOUNDS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shop.catalog"
        fill(folder)
        own = Path(shutil.copytree(folder, Path(temporary) / "own.catalog"))  # one process at a time holds a folder
        cases = {"process start to first hit": processes(folder), **in_process(own)}
        failed = over(gate["bounds"], gate["margin"], lambda name: ratio_of(name, cases[name]))
    if failed:
        sys.exit(f"over its bound twice: {', '.join(failed)}. If that is meant, change {BOUNDS.name} and say why.")


def over(bounds: Mapping[str, float], margin: float, ratio: Callable[[str], float]) -> list[str]:
    """The cases whose ratio is above bound · (1 + margin) in two measurements, the second taken after all others."""

    def worse(name: str) -> bool:
        value, limit = ratio(name), bounds[name] * (1 + margin)
        verdict = "ok" if value <= limit else "OVER"
        print(
            f"{name}: ratio {value:.2f} (bound {bounds[name]:.2f}, with its margin {limit:.2f}) {verdict}", flush=True
        )
        return not value <= limit  # so that NaN is over

    once = [name for name in bounds if worse(name)]
    return [name for name in once if worse(name)]


def ratio_of(name: str, case: Case) -> float:
    """What ours takes of what the peer takes: the median of the rounds' ratios, of processor time."""
    ours, peer, rounds = case
    samples = measure({"ours": ours, "PyTorch": peer}, rounds, clock=processor_time)
    told = ", ".join(f"{who} {1000 * spread(column)['median']:.2f} ms" for who, column in samples.items())
    print(f"{name}: {told}", flush=True)
    return spread([a / b for a, b in zip(samples["ours"], samples["PyTorch"], strict=True)])["median"]


def processor_time() -> float:
    """Seconds of processor time so far, of this process and of those that it has waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def fill(folder: Path) -> None:
    """A small catalog of synthetic products."""
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
    """Ours: a fresh process to its first hit. The peer: a fresh process that only imports what it would search with."""
    search = f"from unidiff_sdk import Catalog; assert Catalog({str(folder)!r}).search('a red mug')"

    def fresh(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return fresh(search), fresh("import torch; from transformers import CLIPModel, CLIPTokenizer"), 3


def in_process(folder: Path) -> dict[str, Case]:
    """Text search and a call of each graph, beside eager PyTorch with the weights that the bundle was exported from."""
    import numpy as np
    import torch

    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    torch.set_num_threads(1)
    bundle = Bundle.open("tiny", threads=1)
    checkpoint = load_checkpoint("tiny")
    catalog = Catalog(folder, bundle=bundle)
    clip, unet, vae = checkpoint.clip, checkpoint.unet, checkpoint.vae
    draw = np.random.default_rng(0).standard_normal
    gallery = draw((ITEMS, bundle.dim)).astype(np.float32)
    # Never the same text twice: ours remembers those.
    asked, asked_in_torch = ((f"a tall red mug, {i}" for i in itertools.count()) for _ in range(2))

    def search_in_torch() -> object:
        tokens = checkpoint.tokenizer(
            [next(asked_in_torch)], padding="max_length", return_tensors="pt", truncation=True
        )
        pooled = clip.text_model(input_ids=tokens["input_ids"]).pooler_output
        embedding = torch.nn.functional.normalize(clip.text_projection(pooled), dim=-1)
        return np.argsort(-(gallery @ embedding[0].numpy()))[:10]

    def beside(graph: str, act: Callable[..., object], **arrays: np.ndarray) -> Case:
        feed = {name: array.astype(np.float32) for name, array in arrays.items()}
        tensors = [torch.from_numpy(array) for array in feed.values()]
        session = bundle.session(graph)
        return lambda: session.run(feed), inference(lambda: act(*tensors)), 40

    def inference(act: Callable[[], object]) -> Callable[[], object]:
        return torch.inference_mode()(act)

    # Two samples in the UNet: one picture with guidance.
    side, channels = unet.config.sample_size, unet.config.in_channels
    states = draw((2, bundle.max_tokens, unet.config.cross_attention_dim))
    return {
        "encode and search a text": (lambda: catalog.search(next(asked)), inference(search_in_torch), 40),
        "encode eight pictures": beside(
            "image_encoder",
            lambda pixels: clip.visual_projection(clip.vision_model(pixels).pooler_output),
            pixel_values=draw((8, 3, bundle.image_size, bundle.image_size)),
        ),
        "one denoising step": beside(
            "unet",
            lambda z, t, conditions: unet(z, t, conditions).sample,
            sample=draw((2, channels, side, side)),
            timestep=np.array([500.0, 500.0]),
            encoder_hidden_states=states,
        ),
        "decode a picture": beside(
            "vae_decoder", lambda z: vae.decode(z).sample, latent_sample=draw((1, channels, side, side))
        ),
    }


if __name__ == "__main__":
    main()
