"""Process start to the first hit on a catalog of 1,000 items, and to the first generated picture, with the memory.

Every figure is of fresh processes, files in the page cache, the clock started before the process is. The peers do the
same with the checkpoint that the built-in bundle was exported from, by the shortest way through their libraries.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, Process, options
from rich.progress import track

ITEMS, STEPS = 1000, 20
PROMPT = "red striped dress"

OURS = {
    "hit": "from unidiff_sdk import Catalog; c = Catalog({folder!r}, create=False); assert len(c.search({prompt!r}))",
    "picture": "from unidiff_sdk import Catalog; c = Catalog({folder!r}, create=False); "
    "assert len(c.generate({prompt!r}, seed=0, steps={steps}))",
}
CHECK = "; import sys; assert 'torch' not in sys.modules"
PEERS = {
    "hit": (
        "transformers + NumPy",
        "import numpy as np, torch; from transformers import CLIPModel, CLIPTokenizer\n"
        "torch.set_num_threads({threads})\n"
        "clip = CLIPModel.from_pretrained({clip!r}); tokenizer = CLIPTokenizer.from_pretrained({clip!r})\n"
        "tokens = tokenizer([{prompt!r}], padding='max_length', return_tensors='pt')\n"
        "with torch.inference_mode():\n"
        "    v = clip.text_projection(clip.text_model(tokens['input_ids']).pooler_output)[0].numpy()\n"
        "assert len(np.argsort(-(np.load({gallery!r}) @ v))[:10])",
    ),
    "picture": (
        "diffusers",
        "import torch; from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline\n"
        "torch.set_num_threads({threads})\n"
        "p = StableDiffusionPipeline.from_pretrained({base!r}, safety_checker=None)\n"
        "p.set_progress_bar_config(disable=True)\n"
        "p.scheduler = DPMSolverMultistepScheduler.from_config(p.scheduler.config)\n"
        "assert p({prompt!r}, num_inference_steps={steps}, guidance_scale=5.0).images",
    ),
}


def shop(folder: Path, items: int) -> Path:
    """A catalog of synthetic products, made once."""
    from unidiff_sdk import Catalog
    from unidiff_sdk.datasets.synthetic import products, render

    chosen = products("fashion-woman", items, seed=1, split="test")
    with Catalog(folder) as catalog:
        for start in track(range(0, items, 100), "Indexing"):
            batch = chosen[start : start + 100]
            catalog.add(
                [render(product) for product in batch],
                texts=[product.caption for product in batch],
                ids=[product.id for product in batch],
                payloads=[{"price": product.price, "catalog": product.catalog} for product in batch],
            )
    return folder


@click.command()
@options
@click.option("--items", default=ITEMS, show_default=True, help="Size of the catalog.")
def main(items: int, **chosen: Any) -> None:
    """Time a fresh process to its first hit and to its first generated picture."""
    bench = Benchmark(__file__, "How long from the start of a process to its first answer?", **chosen)
    import numpy as np

    from unidiff_sdk import Bundle

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shop.catalog"
        gallery = Path(temporary) / "gallery.npy"
        base = Path(__file__).resolve().parent.parent / "unidiff_sdk" / "training" / "recipes" / "tiny_checkpoint"
        facts = {"folder": str(folder), "gallery": str(gallery), "base": str(base), "clip": str(base / "clip")}
        facts |= {"prompt": PROMPT, "steps": str(STEPS), "threads": str(bench.threads)}
        for kind, (peer, code) in PEERS.items():
            case = f"first {kind}, {items:,} items" if kind == "hit" else f"first {kind}, {STEPS} steps, 64 px"
            if not bench.wants(case):
                continue
            if not folder.exists():
                shop(folder, items)
                dim = Bundle.open(verify=False).dim
                np.save(gallery, np.random.default_rng(0).standard_normal((items, dim), dtype=np.float32))
            bench.row(
                case,
                ours={"UniDiff": Process([sys.executable, "-c", OURS[kind].format(**facts) + CHECK])},
                peers={peer: Process([sys.executable, "-c", code.format(**facts)])},
                parameters={"answer": kind},
                note="The peer loads the checkpoint that the bundle was exported from; its gallery is an array.",
            )
    bench.finish()


if __name__ == "__main__":
    main()
