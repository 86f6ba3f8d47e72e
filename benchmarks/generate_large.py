"""A picture of 256 pixels from a model as large as Stable Diffusion 1.5, in time and memory, beside diffusers.

The weights are random (`sd15.py`), which says nothing of quality: int8 keeps no layer back, as it keeps none of the
built-in model's, and how good four steps are is measured on a trained model (`few_steps.py`). Each contestant has a
process of its own. Making the graphs takes some five minutes once.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click
from harness import ROOT, Benchmark, Worker, options

GUIDED, FEW = 25, 4
WORKER = Path(__file__).with_name("picture_worker.py")
DIFFUSERS = "diffusers, eager fp32"


@click.command()
@options
@click.option("--kept", type=click.Path(path_type=Path), default=ROOT / ".cache" / "sd15", help="For the models.")
def main(kept: Path, **chosen: Any) -> None:
    """Draw the same number of steps with each; then four steps without guidance beside diffusers' 25 with it."""
    question = "How long does a picture of a model as large as Stable Diffusion 1.5 take?"
    bench = Benchmark(__file__, question, depends=[WORKER, WORKER.with_name("sd15.py")], **chosen)
    from sd15 import pipeline

    def worker(who: str, folder: Path, steps: int, guidance: float) -> Worker:
        arguments = [WORKER, who, folder, str(steps), str(guidance), str(bench.threads)]
        return open_until_the_end.enter_context(closing(Worker([sys.executable, *arguments])))

    case = f"256 px, {FEW} steps, guided"
    if bench.wants(case):
        int8, fp32 = (pipeline(kept, precision) for precision in ("int8", "fp32"))
        with ExitStack() as open_until_the_end:
            bench.row(
                case,
                ours={
                    "UniDiff int8": worker("ours", int8, FEW, 5),
                    "UniDiff fp32": worker("ours", fp32, FEW, 5),
                },
                peers={DIFFUSERS: worker("diffusers", kept / "sd15", FEW, 5)},
                parameters={"steps": FEW, "guidance": 5},
                rounds=min(bench.rounds, 3),
            )
    case = f"256 px, {FEW} steps unguided against {GUIDED} guided"
    if bench.wants(case):
        int8 = pipeline(kept, "int8")
        with ExitStack() as open_until_the_end:
            bench.row(
                case,
                ours={f"UniDiff int8, {FEW} steps unguided": worker("ours", int8, FEW, 1)},
                peers={f"{DIFFUSERS}, {GUIDED} steps guided": worker("diffusers", kept / "sd15", GUIDED, 5)},
                parameters={"against": GUIDED},
                rounds=min(bench.rounds, 3),
            )
    bench.finish()


if __name__ == "__main__":
    main()
