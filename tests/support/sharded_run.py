"""A training run as one of several processes, or alone: `python -m support.sharded_run REQUEST`, where REQUEST is JSON.

Writes {"losses", "chosen", "stored"} to the file of this process. "stored" has, of each trained weight, the number of
its values and how many of them this process stores: of the weight itself, its average, and the optimizer's moments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from unidiff_sdk.training.config import TrainingConfig
from unidiff_sdk.training.loop import trainer
from unidiff_sdk.training.loop.learner import Learner
from unidiff_sdk.training.runtime.callbacks import ModelSnapshot, ValidationResult
from unidiff_sdk.training.runtime.sharding import local_share

from .processes import free_port

TESTS = Path(__file__).parents[1]


def in_two_processes(out: Path, **request: Any) -> list[dict[str, Any]]:
    """Train in two processes over gloo. Arguments as for `run`. Returns the report of each."""
    reports = [out.with_name(f"{out.name}-rank-{rank}.json") for rank in (0, 1)]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "support.sharded_run", json.dumps(request | {"out": out, "to": file}, default=str)],
            env=os.environ | shared | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
        )
        for rank, file in enumerate(reports)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=600)
        assert rank.returncode == 0, errors.decode()
    return [json.loads(file.read_text(encoding="utf-8")) for file in reports]


def run(
    data: Path,
    base: Path,
    out: Path,
    settings: dict[str, Any],
    *,
    resume: bool = False,
    stop_after: int | None = None,
    validate: bool = False,
) -> dict[str, Any]:
    """Train, and return the report of this process.

    stop_after: Step after which process 0 receives SIGTERM. validate: Choose the final weights by `judge`.
    """
    losses: list[dict[str, float]] = []
    learners: list[Learner] = []

    def on_step(report: Any) -> None:
        losses.append(report.losses)
        if report.step == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    class RecordedLearner(Learner):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            learners.append(self)

    original, trainer.Learner = trainer.Learner, RecordedLearner
    chosen: dict[str, Any] = {}
    try:
        config, judging = TrainingConfig(**settings), judge if validate else None
        request: dict[str, Any] = {"device": "cpu", "resume": resume, "on_step": on_step, "on_validate": judging}
        chosen = trainer.train(data, base, out, config, **request).chosen
    except KeyboardInterrupt:
        assert stop_after
    finally:
        trainer.Learner = original
    return {"losses": losses, "chosen": chosen, "stored": _stored(learners[0])}


def judge(snapshot: ModelSnapshot) -> ValidationResult:
    """Measures that need the whole model in one process: of an image embedding, and of the UNet's output."""
    model: Any = snapshot.model
    u = model.f(torch.linspace(-1, 1, 3 * model.clip_size**2).view(1, 3, model.clip_size, model.clip_size))
    z = torch.linspace(-1, 1, 4 * 16 * 16).view(1, 4, 16, 16)
    output = model.unet(z, 500, torch.zeros(1, 16, model.unet.config.cross_attention_dim)).sample
    return ValidationResult(float(u[0, 0]), {"denoising_loss": float(output.square().mean())}, "judge", "judge")


def _stored(learner: Learner) -> dict[str, tuple[int, list[int]]]:
    stored = {}
    with torch.no_grad():
        for name, weight in learner.trainable.items():
            moments = [value for key, value in learner.optimizer.state[weight].items() if key != "step"]
            tensors = [weight, learner.ema.weights[name], *moments]
            stored[name] = weight.numel(), [local_share(tensor).numel() for tensor in tensors]
    return stored


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    target = Path(arguments.pop("to"))
    for name in ("data", "base", "out"):
        arguments[name] = Path(arguments[name])
    target.write_text(json.dumps(run(**arguments)), encoding="utf-8")
