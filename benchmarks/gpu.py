"""Graphs and images of a model of the size of Stable Diffusion 1.5 on an NVIDIA GPU, next to PyTorch.

    python benchmarks/sd15.py .cache/sd15 sd15      # the checkpoint, of random weights, once
    python benchmarks/gpu.py --out benchmarks/results/h100/gpu.json

Not part of `make bench`: it needs the `gpu` extra and a GPU. All contestants compute in half precision, and each call
starts from NumPy arrays and ends with one. The first rows compare ways to express attention and normalization in ONNX;
`unidiff-export --target cuda` writes the fastest.
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

# name: flavor of the graph, whether its calls are replayed from a CUDA graph. The export offers the first two.
VARIANTS = {
    "channels last": ("channels last", False),
    "channels last, captured": ("channels last", True),
    "channels first": ("channels first", False),
    "channels first, captured": ("channels first", True),
    "standard Attention": ("standard Attention", False),
    "decomposed": ("decomposed", False),
}
EXPORTED = ("channels last", "channels last, captured")
# graph, batch, side of the latents (0 for the encoders, which have one size only), variants
CASES = (
    ("unet", 2, 64, tuple(VARIANTS)),
    ("vae_decoder", 1, 64, tuple(VARIANTS)),
    ("text_encoder", 4, 0, ("channels first",)),  # no convolutions, and a node without a CUDA kernel
    ("image_encoder", 32, 0, EXPORTED),
    ("unet", 16, 64, EXPORTED),
)
EAGER, COMPILED = "PyTorch, eager fp16", "torch.compile fp16, reduce-overhead"
PROMPT, SIDE, STEPS, GUIDANCE = "a red striped dress", 512, 25, 5.0


@click.command()
@options
@click.option(
    "--cache", type=click.Path(path_type=Path), default=ROOT / ".cache" / "sd15", help="Folder for the models."
)
@click.option("--compile/--no-compile", "compiles", default=True, show_default=True, help="With torch.compile.")
def main(cache: Path, compiles: bool, **chosen: Any) -> None:
    """Time one call of every graph, then whole images."""
    import torch

    question = "How long do the graphs and images of Stable Diffusion 1.5 take on a GPU?"
    here = Path(__file__).parent
    depends = [here / "gpu_graphs.py", here / "sd15.py", here / "unet_peer.py"]
    bench = Benchmark(__file__, question, device=torch.cuda.get_device_name(), depends=depends, **chosen)
    bench.report["peaks"] = peaks()
    for graph, batch, side, variants in CASES:
        case = f"{graph}, batch {batch}" + (f", {side}x{side} latents" if side else "")
        if bench.wants(case):
            measure_graph(bench, cache, case, graph, batch, side, variants, compiles)
    case = f"{SIDE} px, {STEPS} steps, guided"
    if bench.wants(case):
        measure_image(bench, cache, case, compiles)
    bench.finish()


def peaks() -> dict[str, float]:
    """Return the rates of a half-precision matrix product in GFLOP/s and of a copy in GB/s, read and written."""
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
    bench: Benchmark,
    cache: Path,
    case: str,
    graph: str,
    batch: int,
    side: int,
    variants: tuple[str, ...],
    compiles: bool,
) -> None:
    import torch
    from gpu_graphs import half_graph
    from torch.utils.flop_counter import FlopCounterMode
    from unet_peer import inputs, module

    feed = inputs(graph, batch, side)
    exact = module(graph, cache / "sd15").cuda()
    with FlopCounterMode(display=False) as counter:
        expected = in_pytorch(exact, feed, torch.float32)()
    del exact
    figures: dict[str, dict[str, float]] = {}
    ours: dict[str, Callable[[], Any]] = {}
    notes = []
    for name in variants:
        flavor, capture = VARIANTS[name]
        subprocess.run([sys.executable, Path(__file__).with_name("gpu_graphs.py"), cache, graph, flavor], check=True)
        try:
            ours[name] = act = in_onnxruntime(half_graph(cache, graph, flavor), feed, capture)
            figures[name] = {"cosine": cosine(act(), expected)}
        except Exception as error:  # a variant that fails is reported on the page
            ours.pop(name, None)
            notes.append(f"{name} failed: {str(error).strip().splitlines()[0][:160]}")
            click.echo(notes[-1], err=True)
    eager = module(graph, cache / "sd15", "float16").cuda().to(memory_format=torch.channels_last)
    peers = {EAGER: in_pytorch(eager, feed, torch.float16)}
    if compiles:
        torch._dynamo.reset()
        peers[COMPILED] = in_pytorch(torch.compile(eager, mode="reduce-overhead"), feed, torch.float16)
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
    """Return a contestant that calls a graph as `Bundle.open(device="cuda", capture=capture)` does."""
    from unidiff_sdk.inference.sessions import create_session

    profile = {name: dict.fromkeys(("min", "opt", "max"), array.shape) for name, array in feed.items()}
    session = create_session(file, device="cuda", profile=profile, capture=capture)
    if session.captured != capture:
        raise RuntimeError("the graph cannot be captured, because a node runs only on the CPU")
    output = "text_embeds" if "text_embeds" in session.outputs else next(iter(session.outputs))
    return lambda: session.run(feed, [output])[output]


def in_pytorch(module: Any, feed: dict[str, Any], dtype: Any) -> Callable[[], Any]:
    """Return a contestant that calls a PyTorch module on the GPU, from NumPy arrays to a NumPy array."""
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


# --- images ----------------------------------------------------------------------------------------------------------


def measure_image(bench: Benchmark, cache: Path, case: str, compiles: bool) -> None:
    """Measure whole images with DDIM; UniDiff runs the graphs of `--target cuda`, captured and not."""
    from unidiff_sdk import Bundle
    from unidiff_sdk.generation.generator import Generator

    folder = pipeline(cache)
    options: dict[str, Any] = {"steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "ddim"}
    ours = {}
    for name, capture in (("UniDiff fp16", False), ("UniDiff fp16, captured", True)):
        generator = Generator(Bundle.open(folder, device="cuda", capture=capture))
        ours[name] = lambda generator=generator: generator.generate(PROMPT, width=SIDE, height=SIDE, **options)
    peers = {"diffusers, eager fp16": in_diffusers(cache, compiled=False)}
    if compiles:
        peers["diffusers, torch.compile fp16, reduce-overhead"] = in_diffusers(cache, compiled=True)
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


def in_diffusers(cache: Path, *, compiled: bool) -> Callable[[], Any]:
    """Return a contestant that generates with diffusers; `compiled`: UNet and decoder, as its documentation advises."""
    import torch
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(cache / "sd15", torch_dtype=torch.float16, safety_checker=None)
    peer = peer.to("cuda")
    peer.set_progress_bar_config(disable=True)
    if compiled:
        torch._dynamo.reset()
        for part in (peer.unet, peer.vae):
            part.to(memory_format=torch.channels_last)
        peer.unet = torch.compile(peer.unet, mode="reduce-overhead", fullgraph=True)
        peer.vae.decode = torch.compile(peer.vae.decode, mode="reduce-overhead", fullgraph=True)
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": SIDE, "height": SIDE}
    return lambda: peer(PROMPT, **options).images


def pipeline(cache: Path) -> Path:
    """Return a folder with the graphs of generation, which `Bundle` opens like the export of another tool."""
    from gpu_graphs import half_graph
    from sd15 import GENERATION, write_pipeline_files

    folder, without_config = cache / "half-pipeline", shutil.ignore_patterns("config.json")
    shutil.rmtree(folder, ignore_errors=True)  # it may be from other code; linking costs nothing
    for graph in GENERATION:
        flavor = "channels first" if graph == "text_encoder" else "channels last"
        subprocess.run([sys.executable, Path(__file__).with_name("gpu_graphs.py"), cache, graph, flavor], check=True)
        source = half_graph(cache, graph, flavor).parent
        shutil.copytree(source, folder / graph, copy_function=os.link, ignore=without_config)
    write_pipeline_files(folder, cache / "sd15")
    return folder


if __name__ == "__main__":
    main()
