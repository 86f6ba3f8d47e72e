"""Generation with the built-in model: single images, concurrent requests, and the overhead of the denoising loop.

The peer is diffusers' pipeline with the checkpoint behind the bundle, the same sampler, steps and guidance. Requests
arrive as a Poisson stream, each in its own thread; the time of a request runs from its arrival to its image.
`overhead` is the share of a ranked generation's time outside the calls of its graphs. `generate_large.py` measures a
model of the size of Stable Diffusion 1.5, `few_steps.py` a distilled model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from harness import Benchmark, Seconds, options

if TYPE_CHECKING:
    from unidiff_sdk import Bundle

PROMPT, GUIDANCE = "a long slim green coat with navy checks", 5.0
SIZES = ((1, 8), (1, 25), (8, 8))  # images, steps
REQUESTS, REQUEST_STEPS = 32, 12
RATES = (0.5, 1.3)  # arrivals, as multiples of the rate of sequential requests
OURS, DIFFUSERS = "UniDiff", "diffusers, eager fp32"


@click.command()
@options
@click.option("--requests", default=REQUESTS, show_default=True, help="Requests in each Poisson stream.")
def main(requests: int, **chosen: Any) -> None:
    """Measure generation with the built-in model, alone and under load, next to diffusers."""
    bench = Benchmark(__file__, "How long does one image take, alone and under load?", **chosen)
    from unidiff_sdk import Bundle

    bundle = Bundle.open("tiny", threads=bench.threads)
    peer = diffusers_pipeline(bench.threads)
    alone(bench, bundle, peer)
    overhead(bench, bundle)
    arrivals(bench, bundle, peer, requests)
    bench.finish()


def diffusers_pipeline(threads: int) -> Callable[..., object]:
    """Return a function (number of images, steps) that generates with diffusers and the same checkpoint."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    folder = load_checkpoint("tiny").path
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def generate(n: int, steps: int) -> object:
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "num_images_per_prompt": n}
        return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images

    return generate


def alone(bench: Benchmark, bundle: Bundle, peer: Callable[..., object]) -> None:
    """Measure generation without ranking, as diffusers has none."""
    from unidiff_sdk.generation.generator import Generator

    generator = Generator(bundle)
    for n, steps in SIZES:
        case = f"tiny, {n} image{'s' if n > 1 else ''} of 64 px, {steps} steps"
        if bench.wants(case):
            bench.row(
                case,
                ours={OURS: lambda: generator.generate(PROMPT, n=n, steps=steps, guidance_scale=GUIDANCE)},  # noqa: B023
                peers={DIFFUSERS: lambda: peer(n, steps)},  # noqa: B023
                parameters={"images": n, "steps": steps},
                items=n,
            )


# --- overhead of the loop --------------------------------------------------------------------------------------------


class Clocked:
    """A session that sums up the time of its calls."""

    def __init__(self, session: Any) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self.providers, self.captured = session.providers, session.captured
        self.session, self.seconds = session, 0.0

    def run(self, *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return self.session.run(*arguments)
        finally:
            self.seconds += time.perf_counter() - started


class Overhead:
    """A contestant that records the share of its time outside the graphs."""

    def __init__(self, sessions: list[Clocked], act: Callable[[], object]) -> None:
        self.sessions, self.act = sessions, act
        self.shares: list[float] = []

    def __call__(self) -> None:
        before, started = sum(session.seconds for session in self.sessions), time.perf_counter()
        self.act()
        inside = sum(session.seconds for session in self.sessions) - before
        self.shares.append(1 - inside / (time.perf_counter() - started))

    def figures(self) -> dict[str, float]:
        """Return the median share over the calls."""
        return {"overhead": round(sorted(self.shares)[len(self.shares) // 2], 4)}


def overhead(bench: Benchmark, bundle: Bundle) -> None:
    """Measure the time of ranked `Catalog.generate` on a small catalog outside the calls of the graphs."""
    from unidiff_sdk import Bundle, Catalog
    from unidiff_sdk.datasets.synthetic import products, render
    from unidiff_sdk.inference.sessions import create_session

    shop = products("fashion-woman", 100, seed=0, split="test")
    sessions: list[Clocked] = []

    def create(file: Path, **options: Any) -> Clocked:
        sessions.append(Clocked(create_session(file, **options)))
        return sessions[-1]

    clocked = Bundle(bundle.path, bundle.manifest, threads=bench.threads, session_factory=create)
    with Catalog(bundle=clocked) as catalog:
        catalog.add([render(p) for p in shop], payloads=[{"catalog": p.catalog} for p in shop])
        for n, steps in SIZES:
            case = f"tiny, {n} ranked image{'s' if n > 1 else ''}, {steps} steps: time outside the graphs"
            if bench.wants(case):
                act = Overhead(sessions, lambda: catalog.generate(PROMPT, n=n, steps=steps, seed=0))  # noqa: B023
                bench.row(case, ours={OURS: act}, peers={}, parameters={"ranked": n, "steps": steps}, rounds=21)


# --- concurrent requests ---------------------------------------------------------------------------------------------


class Stream:
    """A contestant that serves requests at given arrival times, and records how long each waits for its image."""

    def __init__(
        self, serve: Callable[[int], object], arrivals: list[float], lock: AbstractContextManager[Any]
    ) -> None:
        self.serve, self.arrivals, self.lock = serve, arrivals, lock
        self.waits: list[float] = []

    def __call__(self) -> Seconds:
        started = time.perf_counter()
        threads = [threading.Thread(target=self._request, args=(i, started + at)) for i, at in enumerate(self.arrivals)]
        for thread, at in zip(threads, self.arrivals, strict=True):
            time.sleep(max(0.0, started + at - time.perf_counter()))
            thread.start()
        for thread in threads:
            thread.join()
        return Seconds(time.perf_counter() - started)

    def _request(self, seed: int, arrival: float) -> None:
        with self.lock:
            self.serve(seed)
        self.waits.append(time.perf_counter() - arrival)

    def figures(self) -> dict[str, float]:
        """Return the 99th percentile over all requests of all rounds."""
        import numpy as np

        return {"p99_ms": round(1000 * float(np.percentile(self.waits, 99)), 1)}


def arrivals(bench: Benchmark, bundle: Bundle, peer: Callable[..., object], requests: int) -> None:
    """Measure Poisson streams: with shared calls, sequentially, and with diffusers behind a lock."""
    import numpy as np

    from unidiff_sdk.generation.generator import Generator

    generator = Generator(bundle)

    def serve(seed: int) -> object:
        return generator.generate(PROMPT, seed=seed, steps=REQUEST_STEPS, guidance_scale=GUIDANCE)

    for rate in RATES:
        case = f"Poisson arrivals at {rate:g} of the sequential rate"
        if not bench.wants(case):
            continue
        serve(0)
        started = time.perf_counter()
        for seed in range(5):
            serve(seed)
        gap = (time.perf_counter() - started) / 5 / rate
        times = list(np.cumsum(np.random.default_rng(0).exponential(gap, requests)))
        bench.row(
            case,
            ours={
                "UniDiff, shared calls": Stream(serve, times, nullcontext()),
                "UniDiff, sequential": Stream(serve, times, threading.Lock()),
            },
            peers={
                "diffusers behind a lock": Stream(lambda _: peer(1, REQUEST_STEPS), times, threading.Lock()),
            },
            parameters={"load": rate},
            items=requests,
            rounds=min(bench.rounds, 4),
            note=f"{requests} requests for one image of {REQUEST_STEPS} steps. The time runs until the last is served.",
        )


if __name__ == "__main__":
    main()
