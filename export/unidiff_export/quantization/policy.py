"""Decide which layers become int8: all of them, except those that a failed verification forces to stay float.

After a failed comparison, the most sensitive layers of its graphs stay float: first one, then two, four, ... until the
comparison passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from unidiff_export.graphs.lowering import GraphSpec

from .calibration import Calibration, layer_errors, multiply_adds
from .qdq import LayerRanges

# Sensitivities are measured on this many calls. They differ by orders of magnitude, so few calls suffice.
SENSITIVITY_CALLS = 2


class Int8Policy:
    """The layers of each graph that are quantized, given the ranges of a calibration.

    At first all layers are quantized. `keep_more_float` reduces them.
    """

    def __init__(self, specs: Sequence[GraphSpec], calibration: Calibration) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._calibration = calibration
        self._work: dict[str, tuple[dict[str, int], int]] = {}
        for spec in specs:
            first_sample = tuple(x[:1] for x in calibration.inputs[spec.name][0])
            layers, total = multiply_adds(spec, first_sample)
            self._work[spec.name] = {name: work for name, work in layers.items() if work}, total
        self._float_count: dict[str, int] = dict.fromkeys(self._specs, 0)
        self._by_sensitivity: dict[str, list[str]] = {}

    def ranges(self, graph: str) -> dict[str, LayerRanges]:
        """Return the layers of `graph` to quantize, with their ranges."""
        float_layers, (layers, _) = set(self.float_layers(graph)), self._work[graph]
        return {name: self._calibration.ranges[graph][name] for name in layers if name not in float_layers}

    def float_layers(self, graph: str) -> list[str]:
        """Return the layers of `graph` that stay float, most sensitive first."""
        count = self._float_count[graph]
        return self._most_sensitive(graph)[:count] if count else []

    def keep_more_float(self, graphs: Iterable[str]) -> list[str]:
        """Double the number of float layers of `graphs`, starting with one; return the graphs that changed."""
        changed = []
        for graph in dict.fromkeys(name for name in graphs if name in self._work):
            layers, _ = self._work[graph]
            count = min(max(1, 2 * self._float_count[graph]), len(layers))
            if count > self._float_count[graph]:
                self._float_count[graph] = count
                changed.append(graph)
        return changed

    def describe(self, graph: str, quantized: Sequence[str]) -> dict[str, Any]:
        """Return the manifest's entry: the number of quantized layers, their share of multiply-adds, the float layers.

        quantized: the layers of `ranges` that were quantized in the graph.
        """
        layers, total = self._work[graph]
        return {
            "layers": len(quantized),
            "multiply_adds": round(sum(layers[name] for name in quantized) / total, 4),
            "float_layers": self.float_layers(graph),
        }

    def _most_sensitive(self, graph: str) -> list[str]:
        """Return all layers of `graph`, the largest error first. Errors are measured on the first request."""
        if graph not in self._by_sensitivity:
            layers, _ = self._work[graph]
            ranges = {name: self._calibration.ranges[graph][name] for name in layers}
            calls = self._calibration.inputs[graph]
            some = calls[:: max(1, len(calls) // SENSITIVITY_CALLS)][:SENSITIVITY_CALLS]
            errors = layer_errors(self._specs[graph], some, ranges)
            self._by_sensitivity[graph] = sorted(errors, key=lambda name: -errors[name])
        return self._by_sensitivity[graph]
