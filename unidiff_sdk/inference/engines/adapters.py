"""LoRAs that can be switched: their low-rank factors, which the graphs of a bundle take as optional inputs.

    loras/NAME/GRAPH.onnx_adapter     the format of ONNX Runtime, which `onnxruntime.LoraAdapter` loads as well

A layer computes W x + B A x. For several LoRAs, A and B hold the factors of all of them along the rank, and B the
weights: B A = Σ wᵢ Bᵢ Aᵢ.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk._internal.lifetimes import weak_method
from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.inference.folder.files import BundleFiles
from unidiff_sdk.inference.manifest import SwitchableLora

__all__ = ["Adapters", "Loras"]

Float32 = NDArray[np.float32]
Loras = tuple[tuple[str, float], ...]
"""Names of LoRAs, and the weights of their changes."""

CACHED = 8
DOWN = ".lora_A"  # the end of the name of an input for A; the others are for B


class Adapters:
    """The switchable LoRAs of a bundle. May be shared between threads.

    Args:
        files: of the bundle.
        loras: the entries of the manifest.
    """

    def __init__(self, files: BundleFiles, loras: Mapping[str, SwitchableLora]) -> None:
        self._files, self._loras = files, loras
        self._factors = lru_cache(maxsize=CACHED)(weak_method(self._read))
        self._combined = lru_cache(maxsize=CACHED)(weak_method(self._combine))

    def resolve(self, chosen: Mapping[str, float | None]) -> Loras:
        """The LoRAs in the order of their names, with the default of the export where no weight is given.

        Raises:
            OptionError: the bundle has no LoRA of a name.
        """
        for name in chosen:
            if name not in self._loras:
                known = f"It has {', '.join(self._loras)}." if self._loras else "It has none."
                raise OptionError(
                    f"lora: the bundle has no switchable LoRA {name!r:.60}. {known} Export one with "
                    "unidiff-export --lora FILE --lora-switchable."
                )
        weights = {name: self._loras[name].weight if weight is None else weight for name, weight in chosen.items()}
        return tuple(sorted(weights.items()))

    def inputs(self, graph: str, loras: Loras) -> Mapping[str, Float32]:
        """The inputs of a graph for LoRAs, by name. Empty if they do not change it. Raises BundleError."""
        return self._combined(graph, loras) if loras else {}

    def _combine(self, graph: str, loras: Loras) -> Mapping[str, Float32]:
        parts: dict[str, list[Float32]] = {}
        for lora, weight in loras:
            for name, factor in self._factors(graph, lora).items():
                parts.setdefault(name, []).append(factor if name.endswith(DOWN) else np.float32(weight) * factor)
        # The rank is the first axis of a kernel's A and of a matrix's B, and the second one of the others.
        return {
            name: np.concatenate(factors, axis=int((factors[0].ndim == 2) == name.endswith(DOWN)))
            for name, factors in parts.items()
        }

    def _read(self, graph: str, lora: str) -> dict[str, Float32]:
        """The factors of a LoRA by the names of inputs. Empty if it does not change the graph."""
        file = self._loras[lora].files.get(graph)
        if file is None:
            return {}
        from onnxruntime import AdapterFormat

        path = self._files.path(file)
        try:
            values = AdapterFormat.read_adapter(str(path)).get_parameters()
            factors = {name: np.array(value.numpy(), np.float32) for name, value in values.items()}
        except Exception as error:  # ONNX Runtime's exceptions have no common base class
            raise BundleError(
                f"{path}: ONNX Runtime cannot read this adapter ({error}); export the bundle again"
            ) from error
        if not all(np.isfinite(factor).all() for factor in factors.values()):
            raise BundleError(f"{path}: holds values that are not finite; export the bundle again")
        return factors
