"""Graphs of the architectures of Stable Diffusion 1.5 and CLIP, next to other runtimes on a CPU.

Models with random weights (`sd15.py`) are written to .cache/sd15 once. All contestants of a row are in memory at the
same time, each in its own process: for the UNet about 20 GB, without those in TOO_LARGE. int8 quantizes all layers, as
in the built-in model.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, Worker, options, peer_python

HERE = Path(__file__).parent
# model, graph, batch, side of the latents (0 for the encoders, which have one size only)
CASES = (
    ("sd15", "unet", 2, 32),
    ("sd15", "unet", 2, 64),
    ("sd15", "vae_decoder", 1, 32),
    ("sd15", "image_encoder", 4, 0),
    ("sd15", "text_encoder", 4, 0),
    ("vit-b-32", "image_encoder", 4, 0),
    ("vit-b-32", "text_encoder", 4, 0),
)
MODELS = {"sd15": "Stable Diffusion 1.5", "vit-b-32": "CLIP ViT-B/32"}
# Precision of the graphs, and the engine that runs them.
OURS = {
    "UniDiff fp32": ("fp32", "unidiff"),
    "UniDiff int8": ("int8", "unidiff"),
    "UniDiff fp32, OpenVINO fp32": ("fp32", "unidiff-openvino-f32"),
    "UniDiff fp32, OpenVINO bf16": ("fp32", "unidiff-openvino-bf16"),
    "UniDiff int8, OpenVINO bf16": ("int8", "unidiff-openvino-bf16"),
}
# Peers that convert come first, while enough memory is free.
PEERS = {
    "optimum-onnx fp32": ("optimum", "optimum"),
    "OpenVINO fp32": ("openvino", "openvino-f32"),
    "OpenVINO bf16": ("openvino", "openvino-bf16"),
    "diffusers, eager fp32": (None, "eager"),
    "torch.compile bf16": (None, "compiled"),
}
# Memory does not suffice for all UNets. By the side of the latents: those left out, which compute in fp32 or load fp32
# weights, and were behind others where they were measured.
TOO_LARGE = {
    32: {"OpenVINO fp32", "UniDiff fp32, OpenVINO fp32"},
    64: {"optimum-onnx fp32", "OpenVINO fp32", "UniDiff fp32, OpenVINO fp32", "UniDiff fp32, OpenVINO bf16"},
}
LISTED_OPERATORS = 6


@click.command()
@options
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "sd15", help="Folder for the models."
)
def main(cache: Path, **chosen: Any) -> None:
    """Time one call of every graph, in fp32 and int8."""
    depends = [HERE / "sd15.py", HERE / "unet_peer.py"]
    question = "How long does one call of each graph of Stable Diffusion 1.5 take?"
    bench = Benchmark(__file__, question, depends=depends, **chosen)
    from _host import computes_bf16
    from sd15 import graph_file
    from unet_peer import inputs

    for model, graph, batch, side in CASES:
        case = f"{MODELS[model]}, {graph}, batch {batch}" + (f", {side}x{side} latents" if side else "")
        if not bench.wants(case):
            continue
        # In a separate process, which releases its memory.
        subprocess.run([sys.executable, HERE / "sd15.py", cache, model, graph], check=True)
        files = {precision: graph_file(cache, model, graph, precision) for precision in ("fp32", "int8")}
        feed = inputs(graph, batch, side)
        with ProcessPoolExecutor(1, get_context("spawn")) as separate:
            work = separate.submit(multiply_adds, graph, cache / model, feed).result()
            profiles = [
                f"{precision}: {separate.submit(profile, file, feed, bench.threads).result()}"
                for precision, file in files.items()
            ]
        sizes = {
            name: {"disk_mib": round(sum(f.stat().st_size for f in files[precision].parent.iterdir()) / 2**20, 1)}
            for name, (precision, _) in OURS.items()
        }
        left_out = TOO_LARGE[side] if graph == "unet" else set()
        if model != "sd15" or graph == "image_encoder":
            left_out = left_out | {"optimum-onnx fp32"}  # it exports whole pipelines only
        if not computes_bf16():
            left_out = left_out | {name for name in (*OURS, *PEERS) if name.endswith("OpenVINO bf16")}

        def worker(engine: str, environment: str | None, folder: Path) -> Worker:
            script, call = HERE / "unet_peer.py", f"{graph} {batch} {side}"  # noqa: B023
            python = peer_python(environment) if environment else sys.executable
            return Worker([python, script, engine, call, cache / model, folder, str(bench.threads)])  # noqa: B023

        with ExitStack() as workers:
            peers = {
                name: workers.enter_context(closing(worker(engine, environment, cache / f"{model}-peers")))
                for name, (environment, engine) in PEERS.items()
                if name not in left_out
            }
            ours = {
                name: workers.enter_context(closing(worker(engine, None, cache / f"{model}-{precision}")))
                for name, (precision, engine) in OURS.items()
                if name not in left_out
            }
            bench.row(
                case,
                ours=ours,
                peers=peers,
                parameters={"model": model, "graph": graph, "batch": batch, "latent": side},
                figures=sizes,
                items=batch,
                flop=2 * work,
                budget_s=120,
                note=f"Random weights. Shares of the time by ONNX Runtime's profile, {'; '.join(profiles)}.",
            )
    bench.finish()


def multiply_adds(graph: str, checkpoint: Path, feed: dict[str, Any]) -> int:
    """Return the multiply-adds of one call, counted by the shapes alone."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from unet_peer import module

    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(graph, checkpoint).to("meta")(*(torch.from_numpy(array).to("meta") for array in feed.values()))
    return counter.get_total_flops() // 2


def profile(file: Path, feed: dict[str, Any], threads: int) -> str:
    """Return the operators that take the most time of a call, and their shares in percent."""
    import onnxruntime

    from unidiff_sdk.inference.engines.onnx_runtime import avoid_saturation

    settings = onnxruntime.SessionOptions()
    avoid_saturation(settings)
    settings.intra_op_num_threads, settings.enable_profiling = threads, True
    with tempfile.TemporaryDirectory() as folder:
        settings.profile_file_prefix = str(Path(folder, "profile"))
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        for _ in range(2):  # the first warms up
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[str, float] = {}
    runs = [event["ts"] for event in events if event["name"] == "model_run"]
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time") and event["ts"] >= max(runs):
            operator = event["args"]["op_name"]
            spent[operator] = spent.get(operator, 0) + event["dur"]
    most = sorted(spent, key=lambda name: -spent[name])[:LISTED_OPERATORS]
    return ", ".join(f"{name} {spent[name] / sum(spent.values()):.0%}" for name in most)


if __name__ == "__main__":
    main()
