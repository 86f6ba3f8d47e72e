"""Export a tuned checkpoint as a verified ONNX bundle: `unidiff-export` and `export_bundle`."""

from __future__ import annotations

from .exporter import Export, GraphReport, export_bundle

__all__ = ["Export", "GraphReport", "export_bundle"]
