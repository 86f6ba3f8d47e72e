"""Time and memory of one image of 256 pixels with a model of the size of Stable Diffusion 1.5, next to diffusers.

The weights are random (`sd15.py`), so quality is not measured here: int8 quantizes all layers, as it does in the
built-in model, and `few_steps.py` measures four steps with a trained model. Each contestant runs in its own process;
together they take about 20 GB. The graphs are exported once, in about five minutes.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, Worker, options

GUIDED, FEW = 25, 4
WORKER = Path(__file__).with_name("image_worker.py")
OPENVINO = "unidiff-openvino-bf16"
DIFFUSERS = "diffusers, eager fp32"


@click.command()
@options
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "sd15", help="Folder for the models."
)
def main(cache: Path, **chosen: Any) -> None:
    """Compare the same number of steps; then four unguided steps with diffusers' 25 guided ones."""
    question = "How long does one image take with a model of the size of Stable Diffusion 1.5?"
    bench = Benchmark(__file__, question, depends=[WORKER, WORKER.with_name("sd15.py")], **chosen)
    from _host import computes_bf16

    def worker(engine: str, folder: Path, steps: int, guidance: float) -> Worker:
        arguments = [WORKER, engine, folder, str(steps), str(guidance), str(bench.threads)]
        return workers.enter_context(closing(Worker([sys.executable, *arguments])))

    case = f"256 px, {FEW} steps, guided"
    if bench.wants(case):
        int8, fp32 = (generator(cache, precision) for precision in ("int8", "fp32"))
        engines = {"UniDiff int8": ("unidiff", int8), "UniDiff fp32": ("unidiff", fp32)}
        peers = {DIFFUSERS: "diffusers"}
        if computes_bf16():
            engines["UniDiff int8, OpenVINO bf16"] = (OPENVINO, int8)
            peers["diffusers, eager bf16"] = "diffusers-bf16"
        with ExitStack() as workers:
            bench.row(
                case,
                ours={name: worker(engine, folder, FEW, 5) for name, (engine, folder) in engines.items()},
                peers={name: worker(engine, cache / "sd15", FEW, 5) for name, engine in peers.items()},
                parameters={"steps": FEW, "guidance": 5},
                rounds=min(bench.rounds, 3),
            )
    case = f"256 px, {FEW} steps unguided against {GUIDED} guided"
    if bench.wants(case):
        int8 = generator(cache, "int8")
        few = {f"UniDiff int8, {FEW} steps unguided": "unidiff"}
        if computes_bf16():
            few[f"UniDiff int8, OpenVINO bf16, {FEW} steps unguided"] = OPENVINO
        with ExitStack() as workers:
            bench.row(
                case,
                ours={name: worker(engine, int8, FEW, 1) for name, engine in few.items()},
                peers={f"{DIFFUSERS}, {GUIDED} steps guided": worker("diffusers", cache / "sd15", GUIDED, 5)},
                parameters={"peer_steps": GUIDED},
                rounds=min(bench.rounds, 3),
            )
    bench.finish()


def generator(cache: Path, precision: str) -> Path:
    """Return a folder with hard links to the files of generation, without the encoder that `unet.py` adds to them."""
    from sd15 import pipeline

    folder = pipeline(cache, precision)
    target = folder.with_name(f"{folder.name}-generator")
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(folder, target, ignore=shutil.ignore_patterns("image_encoder"), copy_function=os.link))


if __name__ == "__main__":
    main()
