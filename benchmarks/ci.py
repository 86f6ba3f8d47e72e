"""A short gate: the runtime must stay ahead of PyTorch on the same tiny model, in the same run, on one thread.

Only ratios are compared (ours / PyTorch's, smaller is better), ours and theirs taking turns, and of processor time
instead of the clock's, so that a slow or busy machine decides nothing. The bounds are in `bounds.json`; what fails is
measured once more before it counts.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BOUNDS = Path(__file__).with_name("bounds.json")
ITEMS = 256

Case = tuple[Callable[[], object], Callable[[], object], int]  # ours, the peer, rounds


def main() -> None:
    """Measure every case, print the ratios, and exit with 1 if one is over its bound twice."""
    bounds: dict[str, float] = json.loads(BOUNDS.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shop.catalog"
        fill(folder)
        own = Path(shutil.copytree(folder, Path(temporary) / "own.catalog"))  # one process at a time holds a folder
        cases = {"process start to first hit": processes(folder), **in_process(own)}
        failed = [name for name, bound in bounds.items() if not within(name, cases[name], bound)]
        failed = [name for name in failed if not within(f"{name}, again", cases[name], bounds[name])]
    if failed:
        sys.exit(f"over its bound twice: {', '.join(failed)}. If that is meant, change {BOUNDS.name} and say why.")


def within(name: str, case: Case, bound: float) -> bool:
    """Whether ours takes at most `bound` times what the peer takes, by the median of the rounds' ratios."""
    ours, peer, rounds = case
    pairs = [(seconds(ours), seconds(peer)) for _ in range(rounds + 1)][1:]  # the first round warms up
    ratio = statistics.median(a / b for a, b in pairs)
    middle = [1000 * statistics.median(column) for column in zip(*pairs, strict=True)]
    verdict = "ok" if ratio <= bound else "OVER"
    print(f"{name}: {middle[0]:.2f} ms, PyTorch {middle[1]:.2f} ms, ratio {ratio:.2f} (bound {bound:.2f}) {verdict}")
    return ratio <= bound


def seconds(act: Callable[[], object]) -> float:
    """The processor time of one call, in this process and in those that it waits for."""
    before = processor_time()
    act()
    return processor_time() - before


def processor_time() -> float:
    """Seconds of processor time so far, with finished child processes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def fill(folder: Path) -> None:
    """A small catalogue of synthetic products."""
    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render

    chosen = products("ecommerce-product", ITEMS, seed=2)
    with Catalog(folder) as catalog:
        catalog.add(
            [render(product) for product in chosen],
            texts=[product.caption for product in chosen],
            payloads=[{"catalogue": product.catalogue} for product in chosen],
        )


def processes(folder: Path) -> Case:
    """Ours: a fresh process to its first hit. The peer: a fresh process that only imports what it would search with."""
    search = f"from unidiff_sdk import Catalog; assert Catalog({str(folder)!r}).search('a red mug')"

    def fresh(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    return fresh(search), fresh("import torch; from transformers import CLIPModel, CLIPTokenizer"), 3


def in_process(folder: Path) -> dict[str, Case]:
    """Text search and one UNet call, beside eager PyTorch with the weights that the bundle was exported from."""
    import numpy as np
    import torch

    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.training.checkpoint import load_checkpoint

    torch.set_num_threads(1)
    bundle = Bundle.open("tiny", threads=1)
    checkpoint = load_checkpoint("tiny")
    catalog = Catalog(folder, bundle=bundle)
    draw = np.random.default_rng(0).standard_normal
    gallery = draw((ITEMS, bundle.dim)).astype(np.float32)

    @torch.inference_mode()
    def search_in_torch() -> object:
        tokens = checkpoint.tokenizer(["a tall red mug"], padding="max_length", return_tensors="pt", truncation=True)
        pooled = checkpoint.clip.text_model(input_ids=tokens["input_ids"]).pooler_output
        embedding = torch.nn.functional.normalize(checkpoint.clip.text_projection(pooled), dim=-1)
        return np.argsort(-(gallery @ embedding[0].numpy()))[:10]

    # Two samples: one picture with guidance.
    latent = checkpoint.unet.config.sample_size
    arrays = {
        "sample": draw((2, checkpoint.unet.config.in_channels, latent, latent)).astype(np.float32),
        "timestep": np.array([500.0, 500.0], dtype=np.float32),
        "encoder_hidden_states": draw((2, bundle.max_tokens, checkpoint.unet.config.cross_attention_dim)).astype(
            np.float32
        ),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    unet = bundle.session("unet")

    @torch.inference_mode()
    def step_in_torch() -> object:
        return checkpoint.unet(**tensors).sample

    return {
        "encode and search a text": (lambda: catalog.search("a tall red mug"), search_in_torch, 40),
        "one denoising step": (lambda: unet.run(None, arrays), step_in_torch, 40),
    }


if __name__ == "__main__":
    main()
