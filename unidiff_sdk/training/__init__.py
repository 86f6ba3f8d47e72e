"""Joint fine-tuning of CLIP and Stable Diffusion. Needs PyTorch (`pip install 'unidiff-sdk[train]'`).

    from unidiff_sdk.training import TrainingConfig, Validator, train

    config = TrainingConfig(steps=1000, learning_rate=1e-4)
    result = train("products", base="tiny", out="runs/shop", config=config, on_validate=Validator("products-val"))
    print(result.path, result.losses)

`distill` makes a checkpoint generate in few steps, `evaluate` measures it, and `load_checkpoint` opens it. These names
are imported on first use, so importing this package does not import PyTorch. The runtime never imports this package.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints.checkpoint import Checkpoint as Checkpoint
    from .checkpoints.checkpoint import load_checkpoint as load_checkpoint
    from .config import DistillationConfig as DistillationConfig
    from .config import PriorConfig as PriorConfig
    from .config import TrainingConfig as TrainingConfig
    from .evaluation.evaluate import EvaluationResult as EvaluationResult
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.validation import Validator as Validator
    from .loop.distiller import DistillationResult as DistillationResult
    from .loop.distiller import distill as distill
    from .loop.trainer import TrainingResult as TrainingResult
    from .loop.trainer import train as train
    from .runtime.callbacks import StepReport as StepReport

# Module of each public name.
_HOME = {
    "Checkpoint": "checkpoints.checkpoint",
    "DistillationConfig": "config",
    "DistillationResult": "loop.distiller",
    "EvaluationResult": "evaluation.evaluate",
    "PriorConfig": "config",
    "StepReport": "runtime.callbacks",
    "TrainingConfig": "config",
    "TrainingResult": "loop.trainer",
    "Validator": "evaluation.validation",
    "distill": "loop.distiller",
    "evaluate": "evaluation.evaluate",
    "load_checkpoint": "checkpoints.checkpoint",
    "train": "loop.trainer",
}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
