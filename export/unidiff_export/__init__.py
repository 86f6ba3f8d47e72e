"""Export a checkpoint as a verified ONNX bundle: `unidiff-export` and `export_bundle`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .exporter import Export, GraphReport, export_bundle

__all__ = ["Export", "GraphReport", "export_bundle"]


def __getattr__(name: str) -> Any:
    """Import the exporter, and with it PyTorch, on first access, so that `unidiff-export --help` does not need it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import exporter

    return getattr(exporter, name)
