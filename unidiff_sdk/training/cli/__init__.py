"""The commands `unidiff-train`, `unidiff-train distill` and `unidiff-evaluate`.

PyTorch is imported only after the arguments have been checked.
"""

from .distillation import distill
from .evaluation import evaluate
from .training import train

__all__ = ["distill", "evaluate", "train"]

train.add(distill)
