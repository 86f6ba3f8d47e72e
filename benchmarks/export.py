"""Time and peak memory of an export to ONNX with its verification, next to `optimum-cli export onnx` with its own.

Every call starts a new process that reads a checkpoint folder of diffusers and writes fp32 graphs. Both compare each
graph with PyTorch in the same run. UniDiff also exports the image encoder of search, and compares embeddings and whole
images with transformers and diffusers. Stable Diffusion 1.5 has random weights and is written to .cache/sd15 once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, Process, Seconds, options, peer_python

HERE = Path(__file__).parent
TINY = ROOT / "unidiff_sdk" / "training" / "recipes" / "tiny_checkpoint"
ROUNDS = 3  # an export of Stable Diffusion takes minutes
GRAPHS = {"text_encoder", "unet", "vae_encoder", "vae_decoder"}  # of both; the peer exports only what generates
VALIDATES = "Validating ONNX model"  # optimum logs this for each graph


class OurExport(Process):
    """`unidiff-export` to the folder `out`. Exits if its manifest lacks a comparison."""

    def __init__(self, checkpoint: Path, out: Path) -> None:
        super().__init__([sys.executable, "-m", "unidiff_export", checkpoint, "-o", out, "--overwrite"])
        self.out = out

    def __call__(self) -> Seconds:
        seconds = super().__call__()
        parity = json.loads((self.out / "manifest.json").read_text(encoding="utf-8"))["parity"]
        require({*GRAPHS, "image_encoder", "image", "embeddings"} <= parity.keys(), self.argv)
        return seconds


class OptimumExport(Process):
    """`optimum-cli export onnx` to the folder `out`. Exits if it did not validate each graph."""

    def __init__(self, checkpoint: Path, out: Path) -> None:
        command = peer_python("optimum").with_name("optimum-cli")
        argv = [command, "export", "onnx", "--model", checkpoint, "--task", "text-to-image", out]
        super().__init__(argv, {"TRANSFORMERS_VERBOSITY": "info", "HF_HUB_OFFLINE": "1"})

    def __call__(self) -> Seconds:
        seconds = super().__call__()
        require(self.log.count(VALIDATES) == len(GRAPHS), self.argv)
        return seconds


def require(verified: bool, argv: Sequence[str]) -> None:
    """Exit unless an export has verified its graphs, because a time without verification is not comparable."""
    if not verified:
        sys.exit(f"{' '.join(argv)} has not compared all of its graphs with PyTorch")


@click.command()
@options
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "sd15", help="Folder for the models."
)
def main(cache: Path, **chosen: Any) -> None:
    """Measure exports with their verification."""
    question = "How long does an export with verification take, and how much memory?"
    bench = Benchmark(__file__, question, depends=[HERE / "sd15.py"], **chosen)
    for model, checkpoint in {"built-in checkpoint": TINY, "Stable Diffusion 1.5": cache / "sd15"}.items():
        case = f"{model}, fp32, verified"
        if not bench.wants(case):
            continue
        if checkpoint != TINY:
            subprocess.run([sys.executable, HERE / "sd15.py", cache, "sd15"], check=True)
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            bench.row(
                case,
                ours={"UniDiff": OurExport(checkpoint, Path(folder) / "bundle")},
                peers={"optimum": OptimumExport(checkpoint, Path(folder) / "optimum")},
                parameters={"model": model},
                rounds=min(bench.rounds, ROUNDS),
                warm_up=0,
                note="UniDiff also exports and compares the image encoder, embeddings and whole images.",
            )
    bench.finish()


if __name__ == "__main__":
    main()
