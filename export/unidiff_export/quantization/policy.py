"""Which layers become int8: all of them, but for those whose error the evidence does not bear.

The most sensitive ones are kept back first, by measurement: one, two, four, ... of the graphs that a failed check
names, until it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from unidiff_export.graphs.lowering import GraphSpec

from .calibration import Calibration, layer_errors, multiply_adds
from .qdq import LayerRanges

# Layers' errors are compared on so many of the calls that were seen: they differ by orders of magnitude.
ERROR_CALLS = 2


class Int8Policy:
    """What is quantized of each graph, given what its layers saw.

    Nothing is kept back at first. `relax` keeps back more; `ranges` and `describe` tell what is left.
    """

    def __init__(self, specs: Sequence[GraphSpec], calibration: Calibration) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._calibration = calibration
        self._work: dict[str, tuple[dict[str, int], int]] = {}
        for spec in specs:
            one_row = tuple(x[:1] for x in calibration.inputs[spec.name][0])
            layers, total = multiply_adds(spec, one_row)
            self._work[spec.name] = {name: work for name, work in layers.items() if work}, total
        self._kept: dict[str, int] = dict.fromkeys(self._specs, 0)
        self._sensitive: dict[str, list[str]] = {}

    def ranges(self, graph: str) -> dict[str, LayerRanges]:
        """The layers of `graph` that are quantized, and what they span."""
        kept, (layers, _) = set(self.kept_back(graph)), self._work[graph]
        return {name: self._calibration.ranges[graph][name] for name in layers if name not in kept}

    def kept_back(self, graph: str) -> list[str]:
        """The layers of `graph` that stay float, the most sensitive first."""
        return self._by_sensitivity(graph)[: self._kept[graph]] if self._kept[graph] else []

    def relax(self, graphs: Iterable[str]) -> list[str]:
        """Keep back twice as many layers of `graphs`, at first one; the graphs in which there was one left."""
        changed = []
        for graph in dict.fromkeys(name for name in graphs if name in self._work):
            layers, _ = self._work[graph]
            more = min(max(1, 2 * self._kept[graph]), len(layers))
            if more > self._kept[graph]:
                self._kept[graph] = more
                changed.append(graph)
        return changed

    def describe(self, graph: str, quantized: Sequence[str]) -> dict[str, Any]:
        """For the manifest: how many layers were quantized, their share of all multiply-adds, and which are held back.

        quantized: those of `ranges` that the graph let quantize.
        """
        layers, total = self._work[graph]
        return {
            "layers": len(quantized),
            "multiply_adds": round(sum(layers[name] for name in quantized) / total, 4),
            "kept_back": self.kept_back(graph),
        }

    def _by_sensitivity(self, graph: str) -> list[str]:
        """All layers of `graph`, the one whose output suffers most first; measured when it is first asked for."""
        if graph not in self._sensitive:
            layers, _ = self._work[graph]
            ranges = {name: self._calibration.ranges[graph][name] for name in layers}
            calls = self._calibration.inputs[graph]
            few = calls[:: max(1, len(calls) // ERROR_CALLS)][:ERROR_CALLS]
            errors = layer_errors(self._specs[graph], few, ranges)
            self._sensitive[graph] = sorted(errors, key=lambda name: -errors[name])
        return self._sensitive[graph]
