"""Graphs and pictures of a model as large as Stable Diffusion 1.5 on an NVIDIA GPU, beside PyTorch there.

    python benchmarks/sd15.py .cache/sd15 sd15      # the checkpoint, of random weights, once
    python benchmarks/gpu.py --out benchmarks/results/h100/gpu.json

Not part of `make bench`: it needs the `gpu` extra and a GPU. All contestants compute in half precision, and each call
starts from NumPy arrays and ends with one. Which way of saying attention and normalization in ONNX runs best there is
what the first rows are for; `unidiff-export --target cuda` writes the best of them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, options

# name: flavor of the graph, whether its calls are replayed from a CUDA graph. The first two are what users get.
OURS = {
    "channels last": ("channels last", False),
    "channels last, captured": ("channels last", True),
    "channels first": ("channels first", False),
    "channels first, captured": ("channels first", True),
    "standard Attention": ("standard Attention", False),
    "decomposed": ("decomposed", False),
}
CHOSEN = ("channels last", "channels last, captured")
# graph, batch, side of the latents (the encoders have one size only), ways
CASES = (
    ("unet", 2, 64, tuple(OURS)),
    ("vae_decoder", 1, 64, tuple(OURS)),
    ("text_encoder", 4, 0, ("channels first",)),  # it has no pictures, and a node that only a CPU runs
    ("image_encoder", 32, 0, CHOSEN),
    ("unet", 16, 64, CHOSEN),
)
EAGER, COMPILED = "PyTorch, eager fp16", "torch.compile fp16, reduce-overhead"
PROMPT, SIDE, STEPS, GUIDANCE = "a red striped dress", 512, 25, 5.0


@click.command()
@options
@click.option("--kept", type=click.Path(path_type=Path), default=ROOT / ".cache" / "sd15", help="For the models.")
@click.option("--compile/--no-compile", "compiles", default=True, show_default=True, help="With torch.compile.")
def main(kept: Path, compiles: bool, **chosen: Any) -> None:
    """Time one call of every graph, then whole pictures."""
    import torch

    question = "How long do the graphs of Stable Diffusion 1.5, and its pictures, take on a GPU?"
    here = Path(__file__).parent
    depends = [here / "gpu_graphs.py", here / "sd15.py", here / "unet_peer.py"]
    bench = Benchmark(__file__, question, device=torch.cuda.get_device_name(), depends=depends, **chosen)
    bench.report["peaks"] = peaks()
    for graph, batch, side, ways in CASES:
        case = f"{graph}, batch {batch}" + (f", {side}x{side} latents" if side else "")
        if bench.wants(case):
            measure_graph(bench, kept, case, graph, batch, side, ways, compiles)
    case = f"{SIDE} px, {STEPS} steps, guided"
    if bench.wants(case):
        measure_picture(bench, kept, case, compiles)
    bench.finish()


def peaks() -> dict[str, float]:
    """What the GPU reaches in a half-precision matrix product, in GFLOP/s, and in a copy, in GB/s, read and written."""
    import torch

    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    big = torch.empty(2**29, device="cuda", dtype=torch.float16)
    target = torch.empty_like(big)

    def best(act: Callable[[], object]) -> float:
        seconds = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            act()
            end.record()
            torch.cuda.synchronize()
            seconds.append(start.elapsed_time(end) / 1000)
        return min(seconds)

    gemm, copy = best(lambda: a @ a), best(lambda: target.copy_(big))
    return {"gemm_gflop_s": round(2e-9 * 8192**3 / gemm, 1), "copy_gb_s": round(2e-9 * big.nbytes / copy, 1)}


# --- graphs ----------------------------------------------------------------------------------------------------------


def measure_graph(
    bench: Benchmark, kept: Path, case: str, graph: str, batch: int, side: int, ways: tuple[str, ...], compiles: bool
) -> None:
    import torch
    from gpu_graphs import half_graph
    from torch.utils.flop_counter import FlopCounterMode
    from unet_peer import inputs, module

    feed = inputs(graph, batch, side)
    exact = module(graph, kept / "sd15").cuda()
    with FlopCounterMode(display=False) as counter:
        expected = called(exact, feed, torch.float32)()
    del exact
    figures: dict[str, dict[str, float]] = {}
    ours: dict[str, Callable[[], Any]] = {}
    notes = []
    for name in ways:
        flavor, capture = OURS[name]
        subprocess.run([sys.executable, Path(__file__).with_name("gpu_graphs.py"), kept, graph, flavor], check=True)
        try:
            ours[name] = act = in_onnxruntime(half_graph(kept, graph, flavor), feed, capture)
            figures[name] = {"cosine": cosine(act(), expected)}
        except Exception as error:  # a way that does not work there is told, not fatal
            ours.pop(name, None)
            notes.append(f"{name} failed: {str(error).strip().splitlines()[0][:160]}")
            click.echo(notes[-1], err=True)
    eager = module(graph, kept / "sd15", "float16").cuda().to(memory_format=torch.channels_last)
    peers = {EAGER: called(eager, feed, torch.float16)}
    if compiles:
        torch._dynamo.reset()
        peers[COMPILED] = called(torch.compile(eager, mode="reduce-overhead"), feed, torch.float16)
        peers[COMPILED]()
    figures |= {name: {"cosine": cosine(act(), expected)} for name, act in peers.items()}
    bench.row(
        case,
        ours=ours,
        peers=peers,
        parameters={"graph": graph, "batch": batch, "latent": side},
        figures=figures,
        items=batch,
        flop=counter.get_total_flops(),
        rounds=max(bench.rounds, 21),
        warm_up=5,
        budget_s=20,
        note="; ".join(["Random weights", *notes]) + ".",
    )
    ours.clear()
    peers.clear()
    torch.cuda.empty_cache()


def in_onnxruntime(file: Path, feed: dict[str, Any], capture: bool) -> Callable[[], Any]:
    """One call as `Bundle.open(device="cuda", capture=capture)` makes it."""
    from unidiff_sdk.inference.sessions import create_session

    profile = {name: dict.fromkeys(("min", "opt", "max"), array.shape) for name, array in feed.items()}
    session = create_session(file, device="cuda", profile=profile, capture=capture)
    if session.captured != capture:
        raise RuntimeError("a node of the graph runs on the CPU only, so it cannot be captured")
    wanted = "text_embeds" if "text_embeds" in session.outputs else next(iter(session.outputs))
    return lambda: session.run(feed, [wanted])[wanted]


def called(module: Any, feed: dict[str, Any], dtype: Any) -> Callable[[], Any]:
    """A PyTorch module on the GPU, called on copies of NumPy arrays; the result is one again."""
    import torch

    def act() -> Any:
        tensors = [torch.from_numpy(array).cuda() for array in feed.values()]
        with torch.inference_mode():
            result = module(*(t.to(dtype) if t.is_floating_point() else t for t in tensors))
        return result.float().cpu().numpy()

    return act


def cosine(a: Any, b: Any) -> float:
    import numpy as np

    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    return round(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)), 6)


# --- pictures --------------------------------------------------------------------------------------------------------


def measure_picture(bench: Benchmark, kept: Path, case: str, compiles: bool) -> None:
    """DDIM for both. Ours with the graphs that `--target cuda` writes, captured and not."""
    from unidiff_sdk import Bundle
    from unidiff_sdk.generation.generator import Generator

    folder = pipeline(kept)
    settings: dict[str, Any] = {"steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "ddim"}
    ours = {}
    for name, capture in (("UniDiff fp16", False), ("UniDiff fp16, captured", True)):
        generator = Generator(Bundle.open(folder, device="cuda", capture=capture))
        ours[name] = lambda generator=generator: generator.generate(PROMPT, width=SIDE, height=SIDE, **settings)
    peers = {"diffusers, eager fp16": in_diffusers(kept, compiled=False)}
    if compiles:
        peers["diffusers, torch.compile fp16, reduce-overhead"] = in_diffusers(kept, compiled=True)
    bench.row(
        case,
        ours=ours,
        peers=peers,
        parameters={"steps": STEPS, "guidance": GUIDANCE},
        items=1,
        rounds=max(bench.rounds, 11),
        warm_up=2,
        note="Random weights.",
    )


def in_diffusers(kept: Path, *, compiled: bool) -> Callable[[], Any]:
    """A picture by its pipeline; compiled, as its documentation advises: the UNet and the decoder."""
    import torch
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(kept / "sd15", torch_dtype=torch.float16, safety_checker=None)
    peer = peer.to("cuda")
    peer.set_progress_bar_config(disable=True)
    if compiled:
        torch._dynamo.reset()
        for part in (peer.unet, peer.vae):
            part.to(memory_format=torch.channels_last)
        peer.unet = torch.compile(peer.unet, mode="reduce-overhead", fullgraph=True)
        peer.vae.decode = torch.compile(peer.vae.decode, mode="reduce-overhead", fullgraph=True)
    told: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": SIDE, "height": SIDE}
    return lambda: peer(PROMPT, **told).images


def pipeline(kept: Path) -> Path:
    """A folder of the graphs that draw, which `Bundle` opens as it opens what another exporter wrote."""
    from gpu_graphs import half_graph
    from sd15 import DRAWING, surround

    folder, without_config = kept / "half-pipeline", shutil.ignore_patterns("config.json")
    shutil.rmtree(folder, ignore_errors=True)  # of other code, perhaps; making it anew costs nothing
    for graph in DRAWING:
        flavor = "channels first" if graph == "text_encoder" else "channels last"
        subprocess.run([sys.executable, Path(__file__).with_name("gpu_graphs.py"), kept, graph, flavor], check=True)
        source = half_graph(kept, graph, flavor).parent
        shutil.copytree(source, folder / graph, copy_function=os.link, ignore=without_config)
    surround(folder, kept / "sd15")
    return folder


if __name__ == "__main__":
    main()
