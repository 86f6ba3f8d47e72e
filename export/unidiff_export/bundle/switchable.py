"""LoRAs that stay switchable: their factors as files of the bundle, and their images compared with diffusers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from unidiff_export.graphs.adapters import Factors, input_values
from unidiff_export.graphs.lowering import GraphSpec
from unidiff_export.pipeline import GeneratedImages, generate_images, load_pipeline
from unidiff_export.reference import Reference
from unidiff_export.verification import Tolerance, ToleranceError, generate_like, psnr_db
from unidiff_sdk.errors import ExportError, OptionError
from unidiff_sdk.inference.manifest import SwitchableLora
from unidiff_sdk.training.checkpoints.loading.lora import load_lora, low_rank_factors
from unidiff_sdk.training.checkpoints.loading.options import Lora

if TYPE_CHECKING:
    from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint

GRAPHS = ("text_encoder", "text_encoder_2", "unet", "transformer")  # that LoRAs change
FOLDER = "loras"
NAME = re.compile(r"\w[\w.-]*", re.ASCII)
IMAGES = 2  # that each LoRA is compared on


@dataclass(frozen=True)
class LoraExport:
    """A LoRA that stays switchable.

    Attributes:
        name: what generations call it: the name of its file or folder.
        lora: the file and the default weight.
        factors: of each layer that it changes.
        generated: images of diffusers with it.
    """

    name: str
    lora: Lora
    factors: Mapping[nn.Module, Factors]
    generated: GeneratedImages


def check_names(loras: Sequence[Lora]) -> None:
    """Raise OptionError unless each LoRA has a plain name of its own."""
    if not loras:
        raise OptionError("lora_switchable has no effect without a LoRA. Name one with --lora, or leave it out.")
    names = [lora.file.stem for lora in loras]
    for name in names:
        if not NAME.fullmatch(name):
            raise OptionError(
                f"The LoRA {name!r:.100} cannot be switched by this name. Rename the file: letters, digits, _, . and -."
            )
        if names.count(name) > 1:
            raise OptionError(f"Several LoRAs are named {name!r}. Rename the files, so that each can be switched.")


def read_loras(
    checkpoint: Checkpoint, loras: Sequence[Lora], reference: Reference, from_disk: bool
) -> tuple[LoraExport, ...]:
    """Read LoRAs, and generate images with each by diffusers, in the way of the reference.

    Raises:
        CheckpointError: a LoRA cannot be read, or does not fit the models.
    """
    if not loras:
        return ()
    own = load_pipeline(checkpoint, reference.sampler)
    factors = [low_rank_factors(own, lora) for lora in loras]
    pipeline = load_pipeline(checkpoint, reference.sampler, checkpoint.path) if from_disk else own
    found, expected = [], reference.generated
    for lora, layers in zip(loras, factors, strict=True):
        load_lora(pipeline, lora, "lora")
        pipeline.set_adapters(["lora"], [lora.weight])
        generated = generate_images(
            pipeline,
            expected.prompts[:IMAGES],
            side=expected.noise.shape[-1],
            seed=1,
            steps=reference.steps,
            guidance_scale=reference.guidance_scale,
            negative_prompt=expected.negative_prompt,
        )
        pipeline.unload_lora_weights()
        pairs = {layer: Factors(*matrices) for layer, matrices in layers.items()}
        found.append(LoraExport(lora.file.stem, lora, pairs, generated))
    return tuple(found)


def with_optional_inputs(specs: Sequence[GraphSpec], loras: Sequence[LoraExport]) -> list[GraphSpec]:
    """The graphs, with inputs for the layers that LoRAs change. Raises ExportError for a layer in no graph."""
    layers = {layer for lora in loras for layer in lora.factors}
    adapted = []
    for spec in specs:
        own = {name: module for name, module in spec.module.named_modules() if module in layers}
        adapted.append(replace(spec, adapted=own) if own and spec.name in GRAPHS else spec)
    if missing := layers - {module for spec in adapted for module in spec.adapted.values()}:
        raise ExportError(f"{len(missing)} layers that the LoRAs change are in no graph. Merge the LoRAs instead.")
    return adapted


def write_loras(folder: Path, specs: Sequence[GraphSpec], loras: Sequence[LoraExport]) -> dict[str, SwitchableLora]:
    """Write the factors of each LoRA for each graph, and return the entries of the manifest."""
    entries = {}
    for lora in loras:
        files = {}
        for spec in specs:
            values: dict[str, np.ndarray[Any, Any]] = {}
            for name, module in spec.adapted.items():
                if module in lora.factors:
                    values |= input_values(name, lora.factors[module])
            if values:
                files[spec.name] = f"{FOLDER}/{lora.name}/{spec.name}.onnx_adapter"
                _write_adapter(folder / files[spec.name], values)
        entries[lora.name] = SwitchableLora(lora.lora.weight, files)
    return entries


def _write_adapter(path: Path, values: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write inputs of a graph in the format of ONNX Runtime."""
    from onnxruntime import AdapterFormat, OrtValue

    path.parent.mkdir(parents=True, exist_ok=True)
    adapter = AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({name: OrtValue.ortvalue_from_numpy(array) for name, array in values.items()})
    adapter.export_adapter(str(path))


def compare_loras(
    generate: Callable[..., Sequence[Any]], loras: Sequence[LoraExport], reference: Reference, tolerance: Tolerance
) -> dict[str, float]:
    """PSNR of the worst image with each LoRA, by name. Raises ToleranceError if an image deviates too far."""
    found = {}
    for lora in loras:
        images = generate_like(lora.generated, generate, reference, lora={lora.name: lora.lora.weight})
        found[lora.name] = min(map(psnr_db, map(np.asarray, images), lora.generated.images))
        if found[lora.name] < tolerance.image_psnr_db:
            raise ToleranceError(
                f"images with the LoRA {lora.name} diverge from diffusers: PSNR {found[lora.name]:.1f} dB, required ≥ "
                f"{tolerance.image_psnr_db:.0f} dB. {tolerance.advice}",
                ["unet"],
            )
    return found
