"""What the page needs of a bundle: the graphs that it runs, and one JSON document of sizes and sampler tables.

The page has no samplers of its own: it reads the tables of `generation.samplers`, a row for each step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.samplers import SAMPLERS, Table, make_table
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.schedule import Schedule

__all__ = ["check_bundle", "describe_model", "float32_json", "sampler_tables", "schedule_of", "write_model"]

STEPS = (4, 6, 8, 12, 16, 20, 30, 50)
"""The numbers of steps that the page offers, besides the default of the bundle."""

TARGETS = ("cpu", "portable", "web")
"""Targets whose operators onnxruntime-web runs. Only graphs of "web" run on a GPU."""

GRAPHS = ("text_encoder", "clip_text_encoder", "image_encoder", "unet", "vae_decoder")
UNET_INPUTS = {"sample", "timestep", "encoder_hidden_states"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def check_bundle(bundle: Bundle) -> None:
    """Raise OptionError for a bundle that the page cannot run."""
    manifest = bundle.manifest
    if manifest.target not in TARGETS:
        raise OptionError(
            f"{bundle.path} was exported for {manifest.target}, which no browser runs. Export it again with "
            "unidiff-export --target web, and name that bundle: --bundle BUNDLE"
        )
    if bundle.generates and set(getattr(manifest.graphs.get("unet"), "inputs", ())) != UNET_INPUTS:
        raise OptionError(
            f"The page generates with Stable Diffusion 1 and 2, without switchable LoRAs, and {bundle.path} is another "
            "model. Use unidiff serve, or name another bundle: --bundle BUNDLE"
        )
    if bundle.image_patches is not None:
        raise OptionError(
            f"The image encoder of {bundle.path} takes images as lists of patches (NaFlex), which the page does not "
            "make. Use unidiff serve, or index with a model of a fixed resolution."
        )
    for folder in _tokenizers(bundle):
        if f"{folder}/tokenizer.json" not in bundle.files:
            raise OptionError(f"{bundle.path} has no {folder}/tokenizer.json, which the page needs. Export it again.")


def write_model(bundle: Bundle, folder: Path) -> None:
    """Copy the graphs and tokenizers that the page uses. Raises BundleError for a damaged file."""
    for name in _model_files(bundle):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.files.path(name), folder / name)


def describe_model(bundle: Bundle) -> dict[str, Any]:
    """The sizes, defaults and sampler tables of a bundle, for the page."""
    manifest = bundle.manifest
    separate = bundle.has_graph("clip_text_encoder")
    described: dict[str, Any] = {
        "name": bundle.name,
        "precision": bundle.precision,
        "synthetic": bundle.synthetic,
        "gpu": manifest.target == "web",
        "graphs": {name: manifest.graphs[name].file for name in GRAPHS if bundle.has_graph(name)},
        "search": {
            "graph": "clip_text_encoder" if separate else "text_encoder",
            "tokenizer": "clip_tokenizer" if separate else "tokenizer",
            "max_tokens": bundle.max_tokens,
            "dim": bundle.dim,
        },
        "image": {
            "size": bundle.image_size,
            "mean": bundle.image_mean.tolist(),
            "std": bundle.image_std.tolist(),
            "fit": bundle.image_fit,
            "resize": None if bundle.image_resize is None else asdict(bundle.image_resize),
        },
        "generator": None,
    }
    if bundle.generates:
        described["generator"] = {
            "tokenizer": "tokenizer",
            "max_tokens": bundle.prompt_tokens,
            "latent": asdict(bundle.latent),
            "sampler": bundle.sampler.name,
            "steps": bundle.sampler.steps,
            "guidance_scale": bundle.sampler.guidance_scale,
            "samplers": sampler_tables(schedule_of(bundle), bundle.sampler.name, bundle.sampler.steps),
        }
    return described


def schedule_of(bundle: Bundle) -> Schedule:
    """The noise schedule of a bundle that `check_bundle` accepts, so of a UNet."""
    schedule = bundle.schedule()
    assert isinstance(schedule, Schedule)
    return schedule


def sampler_tables(schedule: Schedule, default: str, default_steps: int) -> dict[str, dict[str, Any]]:
    """The tables of all samplers and numbers of steps that the page offers: sampler -> steps -> table.

    "lcm" is only for models that were distilled for it, so it is offered only as the default.
    """
    names = [name for name in SAMPLERS if name != "lcm" or default == "lcm"]
    tables: dict[str, dict[str, Any]] = {}
    for name in names:
        for steps in sorted({*STEPS, default_steps}):
            try:
                table = make_table(name, schedule, steps)
            except OptionError:  # more steps than this sampler has with this schedule
                continue
            tables.setdefault(name, {})[str(steps)] = _table_json(table)
    return tables


def float32_json(values: NDArray[np.float32]) -> Any:
    """An array as nested lists with the shortest decimal fractions that round to its float32 values."""
    return np.array([float(str(value)) for value in values.ravel()]).reshape(values.shape).tolist()


def _table_json(table: Table) -> dict[str, Any]:
    return {"rows": float32_json(table.rows), "init_noise_sigma": table.init_noise_sigma}


def _tokenizers(bundle: Bundle) -> list[str]:
    folders = ["clip_tokenizer"] if bundle.has_graph("clip_text_encoder") else ["tokenizer"]
    return list(dict.fromkeys([*folders, *(["tokenizer"] if bundle.generates else [])]))


def _model_files(bundle: Bundle) -> Iterator[str]:
    for name in GRAPHS:
        if bundle.has_graph(name):
            yield bundle.manifest.graphs[name].file
    for folder in _tokenizers(bundle):
        for file in TOKENIZER_FILES:
            yield f"{folder}/{file}"
