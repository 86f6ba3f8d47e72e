"""A picture alone, many requests at once, and what the loop adds to its graphs.

The pictures of the built-in model are drawn beside diffusers' own pipeline over the checkpoint that the bundle was
exported from: same sampler, steps and guidance. Requests come as a Poisson stream, each in a thread of its own, and
count from their arrival to their picture. `overhead` is the share of a ranked generation's time that is spent outside
the calls of its graphs. A model as large as SD 1.5 is in `generate_large.py`, few steps are in `few_steps.py`.
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
SIZES = ((1, 8), (1, 25), (8, 8))  # pictures, steps
REQUESTS, REQUEST_STEPS = 32, 12
RATES = (0.5, 1.3)  # arrivals, as multiples of what is served one at a time
OURS, DIFFUSERS = "UniDiff", "diffusers, eager fp32"


@click.command()
@options
@click.option("--requests", default=REQUESTS, show_default=True, help="How many come in each Poisson stream.")
def main(requests: int, **chosen: Any) -> None:
    """Measure pictures of the built-in model, alone and in a stream, beside diffusers."""
    bench = Benchmark(__file__, "How long does a picture take, alone and among many?", **chosen)
    from unidiff_sdk import Bundle

    bundle = Bundle.open("tiny", threads=bench.threads)
    drawn_by_diffusers = diffusers_pipeline(bench.threads)
    alone(bench, bundle, drawn_by_diffusers)
    overhead(bench, bundle)
    arrivals(bench, bundle, drawn_by_diffusers, requests)
    bench.finish()


def diffusers_pipeline(threads: int) -> Callable[..., object]:
    """(n pictures, steps) drawn by diffusers from the same checkpoint."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

    torch.set_num_threads(threads)
    folder = load_checkpoint("tiny").path
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)

    def draw(n: int, steps: int) -> object:
        options = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "num_images_per_prompt": n}
        return pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **options).images

    return draw


def alone(bench: Benchmark, bundle: Bundle, peer: Callable[..., object]) -> None:
    """Pictures without ranking, as diffusers draws them."""
    from unidiff_sdk.generation.generator import Generator

    generator = Generator(bundle)
    for n, steps in SIZES:
        case = f"tiny, {n} picture{'s' if n > 1 else ''} of 64 px, {steps} steps"
        if bench.wants(case):
            bench.row(
                case,
                ours={OURS: lambda: generator.generate(PROMPT, n=n, steps=steps, guidance_scale=GUIDANCE)},  # noqa: B023
                peers={DIFFUSERS: lambda: peer(n, steps)},  # noqa: B023
                parameters={"pictures": n, "steps": steps},
                items=n,
            )


# --- what the loop adds ----------------------------------------------------------------------------------------------


class Clocked:
    """A session whose calls are timed."""

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
    """A call, and what share of its time is spent outside its graphs."""

    def __init__(self, sessions: list[Clocked], act: Callable[[], object]) -> None:
        self.sessions, self.act = sessions, act
        self.shares: list[float] = []

    def __call__(self) -> None:
        before, started = sum(session.seconds for session in self.sessions), time.perf_counter()
        self.act()
        inside = sum(session.seconds for session in self.sessions) - before
        self.shares.append(1 - inside / (time.perf_counter() - started))

    def figures(self) -> dict[str, float]:
        """The median over the calls."""
        return {"overhead": round(sorted(self.shares)[len(self.shares) // 2], 4)}


def overhead(bench: Benchmark, bundle: Bundle) -> None:
    """`Catalog.generate`, ranked, on a small catalog: time outside the graphs' calls."""
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
            case = f"tiny, {n} ranked, {steps} steps: outside the graphs"
            if bench.wants(case):
                act = Overhead(sessions, lambda: catalog.generate(PROMPT, n=n, steps=steps, seed=0))  # noqa: B023
                bench.row(case, ours={OURS: act}, peers={}, parameters={"ranked": n, "steps": steps}, rounds=21)


# --- many at once ----------------------------------------------------------------------------------------------------


class Stream:
    """Requests that come when they come: how long until all are served, and how long each waited for its picture."""

    def __init__(self, draw: Callable[[int], object], arrivals: list[float], lock: AbstractContextManager[Any]) -> None:
        self.draw, self.arrivals, self.lock = draw, arrivals, lock
        self.waited: list[float] = []

    def __call__(self) -> Seconds:
        started = time.perf_counter()
        threads = [threading.Thread(target=self._request, args=(i, started + at)) for i, at in enumerate(self.arrivals)]
        for thread, at in zip(threads, self.arrivals, strict=True):
            time.sleep(max(0.0, started + at - time.perf_counter()))
            thread.start()
        for thread in threads:
            thread.join()
        return Seconds(time.perf_counter() - started)

    def _request(self, seed: int, came: float) -> None:
        with self.lock:
            self.draw(seed)
        self.waited.append(time.perf_counter() - came)

    def figures(self) -> dict[str, float]:
        """The 99th percentile over all requests of all rounds."""
        import numpy as np

        return {"p99_ms": round(1000 * float(np.percentile(self.waited, 99)), 1)}


def arrivals(bench: Benchmark, bundle: Bundle, peer: Callable[..., object], requests: int) -> None:
    """Poisson streams that are served together, one at a time, and by diffusers behind a lock."""
    import numpy as np

    from unidiff_sdk.generation.generator import Generator

    generator = Generator(bundle)

    def draw(seed: int) -> object:
        return generator.generate(PROMPT, seed=seed, steps=REQUEST_STEPS, guidance_scale=GUIDANCE)

    for rate in RATES:
        case = f"Poisson arrivals, {rate:g} of what one at a time can do"
        if not bench.wants(case):
            continue
        draw(0)
        began = time.perf_counter()
        for seed in range(5):
            draw(seed)
        gap = (time.perf_counter() - began) / 5 / rate
        moments = list(np.cumsum(np.random.default_rng(0).exponential(gap, requests)))
        bench.row(
            case,
            ours={
                "UniDiff, calls shared": Stream(draw, moments, nullcontext()),
                "UniDiff, one at a time": Stream(draw, moments, threading.Lock()),
            },
            peers={
                "diffusers behind a lock": Stream(lambda _: peer(1, REQUEST_STEPS), moments, threading.Lock()),
            },
            parameters={"load": rate},
            items=requests,
            rounds=min(bench.rounds, 5),
            note=f"{requests} requests for one picture in {REQUEST_STEPS} steps; the time is until the last is served.",
        )


if __name__ == "__main__":
    main()
