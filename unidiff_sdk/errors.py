"""The errors of UniDiff SDK. Every error that the SDK raises on purpose is a `UniDiffError`.

A message says what is wrong, with the value, then what is accepted and what to do next.
"""

from __future__ import annotations

from ._internal.text import terminal_safe

__all__ = [
    "BundleError",
    "BusyError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "FilterError",
    "ForbiddenError",
    "GenerationError",
    "ImageError",
    "InUseError",
    "OptionError",
    "ProviderError",
    "StoreError",
    "StoredImageError",
    "TrainingError",
    "UniDiffError",
]


class UniDiffError(Exception):
    """Base class of all errors of this package. Catch it to handle any of them.

    `str` escapes what a terminal or a log would interpret, because a message can quote a caption or a file name from
    outside. `args` holds the message unchanged.
    """

    def __str__(self) -> str:
        return terminal_safe(super().__str__())


class OptionError(UniDiffError, ValueError):
    """An argument is invalid or out of range. Pass one of the values that the message lists."""


class BundleError(UniDiffError):
    """A bundle is missing, damaged, or lacks the part that a call needs. Export it again, or pass another bundle."""


class ProviderError(UniDiffError):
    """ONNX Runtime or the requested device is not available. Install the extra that the message names."""


class ImageError(UniDiffError):
    """An image cannot be read, or is unsafe to decode. Replace, convert or resize the file."""


class StoredImageError(ImageError):
    """The image of a stored item is missing, damaged, or must not be read. Restore the file, or delete the item."""


class GenerationError(UniDiffError):
    """An image cannot be generated, or its pixels are not finite. Change the options, or use fp32 precision."""


class BusyError(UniDiffError):
    """Too many concurrent calls of one kind. Retry later."""


class DataError(UniDiffError):
    """A dataset on disk is missing, malformed, or refers to files outside its folder. Fix the file in the message."""


class StoreError(UniDiffError):
    """The vector store or the image store failed or refused an operation. Stored items are not lost.

    Attributes:
        stored_ids: the ids of the items that `Catalog.add` had stored before it failed; () if there are none.
    """

    def __init__(self, *args: object, stored_ids: tuple[str | int, ...] = ()) -> None:
        super().__init__(*args)
        self.stored_ids = stored_ids


class InUseError(StoreError):
    """Another process or another `Catalog` object has the catalog open. Close that one first."""


class ForbiddenError(StoreError):
    """The API key of the Qdrant server does not allow an operation. Use a key that may write, or only read."""


class FilterError(StoreError):
    """A search filter is invalid. `unidiff_sdk.store.filters` documents the filter language."""


class CheckpointError(UniDiffError):
    """A training checkpoint is missing, incomplete or inconsistent. Pass a folder that unidiff-train wrote."""


class TrainingError(UniDiffError):
    """A training run cannot start or had to stop. Change the options in the message and resume."""


class ExportError(UniDiffError):
    """A checkpoint cannot be exported, or the exported graphs do not match PyTorch closely enough."""
