"""One hierarchy of errors: whatever the SDK refuses, it refuses with a `UniDiffError`.

A message says what was wrong, with the value, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "BusyError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "FilterError",
    "GenerationError",
    "ImageError",
    "OptionError",
    "ProviderError",
    "StoreError",
    "TrainingError",
    "UniDiffError",
]


class UniDiffError(Exception):
    """Base of every error that this package raises on purpose."""


class OptionError(UniDiffError, ValueError):
    """An argument is not one of the valid values, or lies outside its range."""


class BundleError(UniDiffError):
    """A bundle is missing, incomplete, changed since it was exported, or does not fit what it is used with."""


class ProviderError(UniDiffError):
    """ONNX Runtime is not installed properly, or the requested device did not load."""


class ImageError(UniDiffError):
    """A picture cannot be read, or is refused because decoding it would be dangerous."""


class GenerationError(UniDiffError):
    """A generation was asked for something impossible, or its result is not a picture."""


class BusyError(UniDiffError):
    """As many generations are under way as are taken at once; the same call may succeed later."""


class DataError(UniDiffError):
    """A catalog on disk is missing, malformed, or points outside its own folder."""


class StoreError(UniDiffError):
    """The vector store or the image store refused or failed an operation."""


class FilterError(StoreError):
    """A search filter is malformed."""


class CheckpointError(UniDiffError):
    """A training checkpoint is missing, incomplete or inconsistent."""


class TrainingError(UniDiffError):
    """A training run cannot start or had to stop."""


class ExportError(UniDiffError):
    """A checkpoint cannot be exported, or the export does not match PyTorch closely enough."""
