"""Time and memory of a new process to its first hit in a catalog of 1,000 items, and to its first generated image.

Every call starts a new process with all files in the page cache; the clock starts before the process. The peers do the
same with the checkpoint behind the built-in bundle, in the shortest code that their libraries allow.
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
    "image": "from unidiff_sdk import Catalog; c = Catalog({folder!r}, create=False); "
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
    "image": (
        "diffusers",
        "import torch; from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline\n"
        "torch.set_num_threads({threads})\n"
        "p = StableDiffusionPipeline.from_pretrained({base!r}, safety_checker=None)\n"
        "p.set_progress_bar_config(disable=True)\n"
        "p.scheduler = DPMSolverMultistepScheduler.from_config(p.scheduler.config)\n"
        "assert p({prompt!r}, num_inference_steps={steps}, guidance_scale=5.0).images",
    ),
}


def write_catalog(folder: Path, items: int) -> None:
    """Index synthetic products."""
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


@click.command()
@options
@click.option("--items", default=ITEMS, show_default=True, help="Size of the catalog.")
def main(items: int, **chosen: Any) -> None:
    """Time a new process to its first hit and to its first generated image."""
    bench = Benchmark(__file__, "How long does a new process take to its first answer?", **chosen)
    import numpy as np

    from unidiff_sdk import Bundle

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shop.catalog"
        gallery = Path(temporary) / "gallery.npy"
        base = Path(__file__).resolve().parent.parent / "unidiff_sdk" / "training" / "recipes" / "tiny_checkpoint"
        values = {"folder": str(folder), "gallery": str(gallery), "base": str(base), "clip": str(base / "clip")}
        values |= {"prompt": PROMPT, "steps": str(STEPS), "threads": str(bench.threads)}
        for kind, (peer, code) in PEERS.items():
            case = f"first {kind}, {items:,} items" if kind == "hit" else f"first {kind}, {STEPS} steps, 64 px"
            if not bench.wants(case):
                continue
            if not folder.exists():
                write_catalog(folder, items)
                dim = Bundle.open(verify=False).dim
                np.save(gallery, np.random.default_rng(0).standard_normal((items, dim), dtype=np.float32))
            bench.row(
                case,
                ours={"UniDiff": Process([sys.executable, "-c", OURS[kind].format(**values) + CHECK])},
                peers={peer: Process([sys.executable, "-c", code.format(**values)])},
                parameters={"answer": kind},
                note="The peer loads the checkpoint that the bundle was exported from. Its gallery is an array.",
            )
    bench.finish()


if __name__ == "__main__":
    main()
