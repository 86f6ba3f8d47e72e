"""Families of models, precisions and targets: each bundle generates the images of diffusers' own pipeline.

Every combination is exported from a small model with random weights, a minute each: `make test-matrix`. CI runs a few
of them that cover all families, precisions and targets. What is not supported is refused by name, which the quick tests
check as well.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from support.random_checkpoint import CAPTIONS
from support.random_sd3 import make_random_sd3
from support.random_sdxl import make_random_sdxl

from unidiff_export import export_bundle
from unidiff_export.options import PRECISIONS, TARGETS
from unidiff_export.verification import TOLERANCES, psnr_db
from unidiff_sdk.errors import OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle

PROMPTS = list(CAPTIONS[:2])
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
GRAPH_TARGETS = ("cpu", "portable", "tensorrt")  # graphs for cuda have operators that only a GPU runs


def stable_diffusion(base: Path, folder: Path, **scheduler: Any) -> Path:
    """A copy of a checkpoint with other settings of the scheduler."""
    shutil.copytree(base, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | scheduler))
    return folder


def penultimate(base: Path, folder: Path) -> Path:
    """Stable Diffusion 2.1: the text encoder lacks the last layer of its CLIP."""
    from transformers import CLIPTextModel

    stable_diffusion(base, folder, prediction_type="v_prediction")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    layers = getattr(encoder, "text_model", encoder).encoder.layers
    del layers[-1]
    encoder.config.num_hidden_layers -= 1
    encoder.save_pretrained(folder / "text_encoder")
    return folder


FAMILIES: dict[str, Callable[[Path, Path], Path]] = {
    "1": stable_diffusion,
    "2 (v-prediction)": lambda base, folder: stable_diffusion(base, folder, prediction_type="v_prediction"),
    "2.1 (penultimate layer)": penultimate,
    "zero terminal SNR": lambda base, folder: stable_diffusion(base, folder, **ZERO_SNR),
    "XL": lambda base, folder: make_random_sdxl(folder),
    "XL Turbo": lambda base, folder: make_random_sdxl(folder, timestep_spacing="trailing"),
    "3.5": lambda base, folder: make_random_sd3(folder),
}
GUIDANCE = {"XL Turbo": 1.0}


def cells() -> Iterator[Any]:
    """All combinations. Those marked `covering` have each family, and each supported precision of each target."""
    supported = [
        (name, target) for target in GRAPH_TARGETS for name in PRECISIONS if name in TARGETS[target].precisions
    ]
    chosen = set(zip(cycle(FAMILIES), supported, strict=False))
    assert len(chosen) == len(supported) >= len(FAMILIES)
    for family in FAMILIES:
        for precision, target in product(PRECISIONS, GRAPH_TARGETS):
            marks = [pytest.mark.slow] if (precision, target) in supported else []
            marks += [pytest.mark.covering] if (family, (precision, target)) in chosen else []
            yield pytest.param(family, precision, target, id=f"{family}-{precision}-{target}", marks=marks)


@pytest.fixture(scope="module")
def family(
    request: pytest.FixtureRequest, random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    folder = FAMILIES[request.param](random_checkpoint, tmp_path_factory.mktemp("family") / "checkpoint")
    meta = json.loads((folder / "unidiff.json").read_text()) if (folder / "unidiff.json").exists() else {}
    (folder / "unidiff.json").write_text(json.dumps(meta | {"captions": list(CAPTIONS)}))
    return request.param, folder


@pytest.mark.parametrize(("family", "precision", "target"), list(cells()), indirect=["family"])
def test_bundle_generates_the_images_of_diffusers(
    family: tuple[str, Path], precision: str, target: str, tmp_path: Path
) -> None:
    name, folder = family
    if precision not in TARGETS[target].precisions:
        with pytest.raises(OptionError, match=f"target {target} does not support {precision}"):
            export_bundle(folder, tmp_path / "bundle", precision=precision, target=target)
        return
    bundle = Bundle.open(export_bundle(folder, tmp_path / "bundle", precision=precision, target=target).path, threads=1)
    guidance = GUIDANCE.get(name, 4.0)
    shape = (2, bundle.latent.channels, bundle.latent.size, bundle.latent.size)
    latents = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    sampler = "flow_euler" if name == "3.5" else "euler"
    ours = Generator(bundle).generate(PROMPTS, latents=latents, steps=4, sampler=sampler, guidance_scale=guidance)
    theirs = generated_by_diffusers(folder, latents, guidance)
    for image, expected in zip(ours, theirs, strict=True):
        assert psnr_db(np.asarray(image), np.asarray(expected)) >= TOLERANCES[precision].image_psnr_db


def generated_by_diffusers(folder: Path, latents: np.ndarray, guidance: float) -> Any:
    from diffusers import DiffusionPipeline, EulerDiscreteScheduler

    absent = {"text_encoder_3": None, "tokenizer_3": None} if (folder / "transformer").is_dir() else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, safety_checker=None, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if hasattr(pipeline, "unet"):  # flow matching has one scheduler, the pipeline's own
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    return pipeline(PROMPTS, latents=torch.from_numpy(latents), num_inference_steps=4, guidance_scale=guidance).images
