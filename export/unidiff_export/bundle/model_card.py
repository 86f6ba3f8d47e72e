"""The model card of a bundle: README.md with Hugging Face front matter, written with every export.

The card states what the manifest and the checkpoint's metadata record. It is not listed in the manifest's `files`, so
users may edit it: the bundle still opens, and its fingerprint does not change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from unidiff_export.options import TARGETS
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.training.checkpoints.model_card import (
    TAGS,
    code_literal,
    describe_additions,
    describe_data,
    describe_limits,
    inline_code,
    markdown_section,
    markdown_table,
    markdown_text,
)

from .files import MODEL_CARD

FRONT_MATTER = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)
GENERATOR_TAG = "stable-diffusion"
LICENSE = re.compile(r"^license:[ \t]*['\"]?([\w.+-]+)", re.MULTILINE)
EXPORTED = "An ONNX bundle of UniDiff SDK, exported from the checkpoint {checkpoint} in {precision} for {purpose}. "
SUMMARY = (
    "CLIP searches a product catalog by text and by image, and Stable Diffusion generates product images from text, "
    "both without PyTorch."
)
SEARCH_SUMMARY = (
    "It searches a product catalog by text and by image, without PyTorch. It has no generator, so it cannot generate "
    "images or re-rank with one."
)
USE = """\
```python
from unidiff_sdk import {names}

with Catalog("shop.catalog", bundle={bundle}) as catalog:
    catalog.add_folder("products")
    hits = catalog.search({prompt})
```
"""
GENERATE = """\
The same catalog generates images:

```python
generation = catalog.generate({prompt})
```

The folder is also a diffusers pipeline for optimum:

```python
from optimum.onnxruntime import ORTDiffusionPipeline

pipeline = ORTDiffusionPipeline.from_pretrained("BUNDLE"{provider})
image = pipeline({prompt}, num_inference_steps={steps}, guidance_scale={guidance_scale}).images[0]
```
"""


def write_model_card(folder: Path, manifest: Manifest, meta: Mapping[str, Any], checkpoint: Path) -> None:
    """Write the card of the bundle in `folder`.

    Args:
        folder: the bundle folder.
        manifest: its manifest, with the evidence.
        meta: the checkpoint's metadata.
        checkpoint: the folder of the exported checkpoint. Its own card may name a license.
    """
    card = model_card(manifest, meta, checkpoint.name, license_of(checkpoint))
    (folder / MODEL_CARD).write_text(card, encoding="utf-8")


def license_of(checkpoint: Path) -> str | None:
    """Return the license in the front matter of the checkpoint's README.md, or None."""
    card = checkpoint / MODEL_CARD
    front_matter = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    found = LICENSE.search(front_matter[1]) if front_matter else None
    return found[1] if found else None


def model_card(manifest: Manifest, meta: Mapping[str, Any], checkpoint: str, license: str | None = None) -> str:
    """Return the card as Markdown.

    Args:
        manifest: the bundle's manifest, with or without evidence.
        meta: the checkpoint's metadata (unidiff.json).
        checkpoint: the name of the checkpoint if its metadata has none.
        license: the license if it is known.
    """
    sections = [
        _front_matter(manifest, meta, license),
        f"# {markdown_text(manifest.name)}",
        EXPORTED.format(
            checkpoint=inline_code(meta.get("name", checkpoint)),
            precision=manifest.precision,
            purpose=TARGETS[manifest.target].purpose if manifest.target else "ONNX Runtime",
        )
        + (SUMMARY if manifest.sampler else SEARCH_SUMMARY),
        *markdown_section("Training", _training(meta)),
        *markdown_section("Contents", _contents(manifest)),
        *markdown_section("Comparison with PyTorch", _comparison(manifest)),
        *markdown_section("Intended use and limits", _limits(manifest, meta)),
        *markdown_section("How to use", [_use(manifest, meta)]),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _front_matter(manifest: Manifest, meta: Mapping[str, Any], license: str | None) -> str:
    tags = [tag for tag in TAGS if manifest.sampler or tag != GENERATOR_TAG]
    data = ModelCardData(
        base_model=meta.get("base_model"),
        library_name="unidiff-sdk",
        license=license,
        pipeline_tag="text-to-image" if manifest.sampler else "zero-shot-image-classification",
        tags=sorted([*tags, "onnx", "onnxruntime", manifest.precision]),
    )
    return f"---\n{data.to_yaml()}\n---"


def _training(meta: Mapping[str, Any]) -> Iterator[str]:
    if "teacher" in meta:
        yield f"The UNet is distilled from {markdown_text(meta['teacher']['name'])}."
    elif "base" in meta:
        yield f"Fine-tuned from the base {markdown_text(meta['base'])}."
    yield from describe_additions(meta)
    yield from describe_data(meta)


def _contents(manifest: Manifest) -> Iterator[str]:
    yield markdown_table(
        ("graph", "precision", "size"),
        [
            (name, graph.precision, f"{graph.bytes / 1e6:.1f} MB" if graph.bytes else "")
            for name, graph in manifest.graphs.items()
        ],
    )
    facts = []
    if manifest.latent:
        facts.append(f"{manifest.latent.size * manifest.latent.scale_factor} px for generated images")
    if manifest.image and manifest.embedding:
        facts += [f"{manifest.image.size} px for searched images", f"{manifest.embedding.dim} dimensions of embeddings"]
    sizes = f"Sizes: {', '.join(facts)}."
    if sampler := manifest.sampler:
        sizes += (
            f" Defaults of generation: sampler {sampler.name}, {sampler.steps} steps, guidance scale "
            f"{sampler.guidance_scale:g}."
        )
    yield sizes
    if manifest.devices:
        yield f"Devices: {', '.join(manifest.devices)}."
    if manifest.loras:
        loras = ", ".join(f"{inline_code(name)} (weight {lora.weight:g})" for name, lora in manifest.loras.items())
        yield f"LoRAs that a generation can switch on: {loras}."


def _comparison(manifest: Manifest) -> Iterator[str]:
    parity = dict(manifest.parity or {})
    image, search, embeddings = (parity.pop(name, {}) for name in ("image", "search", "embeddings"))
    if graphs := {name: parity[name] for name in manifest.graphs if name in parity}:
        yield markdown_table(
            ("graph", "largest error", "cosine"),
            [(name, f"{figures['max_abs_error']:.1e}", f"{figures['cosine']:.5f}") for name, figures in graphs.items()],
        )
    results = []
    if image:
        results.append(("PSNR of the worst image", f"{image['psnr_db']:.1f} dB", f"≥ {image['tolerance_db']:.0f} dB"))
    if "agreement" in image:
        results.append(
            ("image-prompt cosine", f"{image['agreement']:.3f}", f"PyTorch {image['reference_agreement']:.3f}")
        )
    if search:
        recall, reference = search["recall_at_1"], search["reference_recall_at_1"]
        results.append((f"R@1 over {search['pairs']} pairs", f"{recall:.1%}", f"PyTorch {reference:.1%}"))
    if embeddings and not image:
        worst = min(embeddings["text_cosine"], embeddings["image_cosine"])
        results.append(("worst embedding of unusual inputs", f"{worst:.5f}", f"≥ {embeddings['min_cosine']}"))
    if results:
        yield markdown_table(("result", "bundle", "limit or reference"), results)


def _limits(manifest: Manifest, meta: Mapping[str, Any]) -> Iterator[str]:
    if manifest.sampler:
        yield from describe_limits({**meta, "synthetic": manifest.synthetic})
    else:
        yield "Intended for searching a catalog of images. Search results can repeat biases of the model and its data."
    if manifest.precision == "int8":
        yield "int8 is fast on CPUs with VNNI. On other CPUs, UniDiff SDK prevents saturated sums at the cost of speed."


def _sampler_values(manifest: Manifest) -> dict[str, str]:
    sampler = manifest.sampler
    return {"steps": str(sampler.steps), "guidance_scale": f"{sampler.guidance_scale:g}"} if sampler else {}


def _use(manifest: Manifest, meta: Mapping[str, Any]) -> str:
    on_gpu = manifest.devices == ("cuda",)
    values = {
        "names": "Bundle, Catalog" if on_gpu else "Catalog",
        "bundle": 'Bundle.open("BUNDLE", device="cuda")' if on_gpu else '"BUNDLE"',
        "provider": ', provider="CUDAExecutionProvider"' if on_gpu else "",
        **_sampler_values(manifest),
        "prompt": code_literal(
            min(meta.get("captions", ()) or ["a red dress"], key=len)
        ),  # last: it may contain braces
    }
    text = f"{USE}\n{GENERATE}" if manifest.sampler else USE
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text
