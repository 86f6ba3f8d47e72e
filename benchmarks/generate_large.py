"""A picture of 256 pixels from a model as large as Stable Diffusion 1.5, in time and memory, beside diffusers.

The weights are random, which says nothing of quality: int8 keeps back what its evidence asks for, and how good four
steps are is measured on a trained model (`few_steps.py`). Each contestant has a process of its own.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import click
from harness import Benchmark, Worker, options

GUIDED, FEW = 25, 4
WORKER = Path(__file__).with_name("picture_worker.py")
DIFFUSERS = "diffusers, eager fp32"


@click.command()
@options
@click.option("--checkpoint", type=click.Path(path_type=Path), required=True, help="What `sd15.py` has written.")
@click.option("--int8", type=click.Path(path_type=Path), required=True, help="Its bundle in 8-bit integers.")
@click.option("--fp32", type=click.Path(path_type=Path), required=True, help="Its bundle in single precision.")
def main(checkpoint: Path, int8: Path, fp32: Path, **chosen: Any) -> None:
    """Draw the same number of steps with each; then four steps without guidance beside diffusers' 25 with it."""
    bench = Benchmark(__file__, "How long does a picture take as large a model as SD 1.5?", depends=[WORKER], **chosen)

    def worker(who: str, folder: Path, steps: int, guidance: float) -> Worker:
        arguments = [WORKER, who, folder, str(steps), str(guidance), str(bench.threads)]
        return open_until_the_end.enter_context(closing(Worker([sys.executable, *arguments])))

    case = f"256 px, {FEW} steps, guided"
    if bench.wants(case):
        with ExitStack() as open_until_the_end:
            bench.row(
                case,
                ours={
                    "UniDiff int8": worker("ours", int8, FEW, 5),
                    "UniDiff fp32": worker("ours", fp32, FEW, 5),
                },
                peers={DIFFUSERS: worker("diffusers", checkpoint, FEW, 5)},
                parameters={"steps": FEW, "guidance": 5},
                rounds=min(bench.rounds, 3),
            )
    case = f"256 px, {FEW} steps unguided against {GUIDED} guided"
    if bench.wants(case):
        with ExitStack() as open_until_the_end:
            bench.row(
                case,
                ours={f"UniDiff int8, {FEW} steps unguided": worker("ours", int8, FEW, 1)},
                peers={f"{DIFFUSERS}, {GUIDED} steps guided": worker("diffusers", checkpoint, GUIDED, 5)},
                parameters={"against": GUIDED},
                rounds=1,
            )
    bench.finish()


if __name__ == "__main__":
    main()
