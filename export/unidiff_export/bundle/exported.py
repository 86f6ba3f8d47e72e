"""What is exported: graphs with their configurations, the reference of PyTorch, and how further files are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from unidiff_export.graphs.lowering import GraphSpec
from unidiff_export.quantization.policy import Int8Policy
from unidiff_export.reference import SearchReference
from unidiff_sdk.inference.manifest import Manifest, ModelDescription
from unidiff_sdk.training.runtime.allocator import return_freed_memory

from .switchable import LoraExport

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """A model, ready for writing and comparing a bundle. With or without a generator.

    Attributes:
        specs: the graphs.
        configs: the configuration of each graph's model, for its config.json.
        description: sizes and defaults for the manifest.
        reference: the results of PyTorch. With a generator it is a `Reference`.
        policy: the layers to quantize; None for fp32 and fp16.
        write_files: writes the files that are not graphs into the bundle folder.
        write_card: writes the model card for the final manifest into the bundle folder.
        loras: LoRAs that stay switchable.
        modules: the models. Their weights are released once no graph is written again, before ONNX Runtime loads one.
    """

    specs: Sequence[GraphSpec]
    configs: Mapping[str, Any]
    description: ModelDescription
    reference: SearchReference
    policy: Int8Policy | None
    write_files: Callable[[Path], None]
    write_card: Callable[[Path, Manifest], None]
    loras: Sequence[LoraExport] = ()
    modules: Sequence[nn.Module] = ()

    def release_weights(self) -> None:
        """Release the memory of all weights; configurations and tokenizers stay."""
        for module in self.modules:
            module.to("meta")
        return_freed_memory()
