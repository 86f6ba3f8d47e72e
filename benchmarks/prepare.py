"""Create what the benchmarks keep under `.cache`; `make bench` runs this first.

That is: the environments of the peers, the embeddings of 100,300 products, models of the size of Stable Diffusion 1.5
and CLIP ViT-B/32 with their graphs and the peers' conversions of them, and the distilled student of `few_steps.py`. All
of it takes 20 GB of disk. Once everything exists, this script takes seconds.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import click
from harness import ROOT, Worker, peer_python

HERE, CACHE = Path(__file__).parent, ROOT / ".cache"
MODELS = CACHE / "sd15"


def main() -> None:
    """Create what is missing, and report how long each part took."""
    for act in (environments, gallery, models, conversions, encoders, student):
        started = time.monotonic()
        act()
        click.echo(f"{act.__name__}: ready after {time.monotonic() - started:.0f} s", err=True)


def environments() -> None:
    """Install the peers."""
    for requirements in sorted((HERE / "peers").glob("*.txt")):
        peer_python(requirements.stem)


def gallery() -> None:
    """Render and encode the products of `search.py`."""
    subprocess.run([sys.executable, HERE / "gallery.py"], check=True)


def models() -> None:
    """Write each graph of `unet.py` in a separate process, which releases its memory."""
    for model, graph in _graphs():
        subprocess.run([sys.executable, HERE / "sd15.py", MODELS, model, graph], check=True)


def conversions() -> None:
    """Let the peers of `unet.py` convert the models, as each does when it loads one for the first time."""
    for model, graph in _graphs():
        folder = MODELS / f"{model}-peers"
        files = {("openvino", "openvino-f32"): folder / "openvino" / f"{graph}.xml"}
        if model == "sd15" and graph != "image_encoder":  # optimum exports whole pipelines only
            files["optimum", "optimum"] = folder / "optimum" / graph / "model.onnx"
        for (environment, engine), file in files.items():
            if not file.is_file():
                argv = [peer_python(environment), HERE / "unet_peer.py", engine, f"{graph} 1 32"]
                with closing(Worker([*argv, MODELS / model, folder, "2"])):
                    pass


def encoders() -> None:
    """Export the image encoder of `indexing.py`."""
    from vit import vit_bundle, vit_checkpoint

    for precision in ("fp32", "int8"):
        vit_bundle(vit_checkpoint(), precision)


def student() -> None:
    """Distill and export the students of `few_steps.py`."""
    from few_steps import DISTILLATIONS, WORK, student

    from unidiff_sdk import Bundle

    for seed in DISTILLATIONS:
        student(WORK, Bundle.open("tiny"), seed)


def _graphs() -> list[tuple[str, str]]:
    from unet import CASES

    return list(dict.fromkeys((model, graph) for model, graph, *_ in CASES))


if __name__ == "__main__":
    main()
