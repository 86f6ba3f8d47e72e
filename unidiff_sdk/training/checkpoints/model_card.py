"""The model card of a checkpoint: README.md with Hugging Face front matter, written with every saved checkpoint.

The card states only what the checkpoint's metadata (unidiff.json) records. A license is never stated, because the
metadata does not know it: it follows from the base and the data.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from unidiff_sdk._internal.text import terminal_safe
from unidiff_sdk.errors import CheckpointError
from unidiff_sdk.training.config import TERM_TITLES, with_current_names

from .checkpoint import METADATA
from .json_files import read_json, write_json

__all__ = [
    "MODEL_CARD",
    "TAGS",
    "add_evaluation",
    "code_literal",
    "describe_additions",
    "describe_data",
    "describe_limits",
    "inline_code",
    "markdown_section",
    "markdown_table",
    "markdown_text",
    "model_card",
]

MODEL_CARD = "README.md"
SEARCH_TAGS = ["image-text-retrieval", "product-catalog", "unidiff-sdk"]
TAGS = ["clip", "image-text-retrieval", "product-catalog", "stable-diffusion", "unidiff-sdk"]
# Settings in the order of the card: (field of the configuration, title).
SETTINGS = {
    "steps": "optimizer steps",
    "batch_size": "pairs per step",
    "contrastive_batch": "pairs per step in the contrastive term",
    "learning_rate": "peak learning rate",
    "learning_rate_unet": "peak learning rate, UNet",
    "learning_rate_text": "peak learning rate, text side",
    "learning_rate_image": "peak learning rate, image side",
    "lora_unet": "LoRA rank, UNet",
    "lora_text": "LoRA rank, text side",
    "lora_image": "LoRA rank, image side",
    "lock_unet": "UNet locked",
    "lock_text": "text side locked",
    "lock_image": "image side locked",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "ema_decay": "EMA decay",
    "caption_dropout": "caption dropout",
    "aspect_buckets": "aspect-ratio buckets",
    "precision": "precision of the forward passes",
    "student_steps": "denoising steps of the student",
    "teacher_steps": "denoising steps of the teacher",
    "trajectories": "teacher trajectories",
}
USE = """\
Generate images with diffusers:

```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("CHECKPOINT"{absent})
image = pipeline("{prompt}"{arguments}).images[0]
```

Embed images and texts with transformers:

```python
from transformers import CLIPModel, CLIPProcessor

clip = CLIPModel.from_pretrained("CHECKPOINT/clip")
processor = CLIPProcessor.from_pretrained("CHECKPOINT/clip")
```

Export an ONNX bundle that searches and generates without PyTorch:

```shell
unidiff-export CHECKPOINT -o BUNDLE
```
"""

USE_SEARCH = """\
Embed images and texts with transformers:

```python
from transformers import AutoImageProcessor, AutoTokenizer, {family}Model

model = {family}Model.from_pretrained("CHECKPOINT")
tokenizer = AutoTokenizer.from_pretrained("CHECKPOINT")
processor = AutoImageProcessor.from_pretrained("CHECKPOINT")
```

Export an ONNX bundle that searches without PyTorch:

```shell
unidiff-export --clip CHECKPOINT -o BUNDLE
```
"""


def model_card(meta: Mapping[str, Any]) -> str:
    """The card as Markdown. meta: the content of unidiff.json."""
    sections = [
        _front_matter(meta),
        f"# {markdown_text(meta.get('name', 'UniDiff checkpoint'))}",
        _summary(meta),
        *markdown_section("Training data", describe_data(meta)),
        *markdown_section("Recipe", _recipe(meta)),
        *markdown_section("Results", _results(meta)),
        *markdown_section("Intended use and limits", describe_limits(meta)),
        *markdown_section("How to use", [_use(meta)]),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def add_evaluation(checkpoint: Path, figures: Mapping[str, Any]) -> None:
    """Record the figures of an evaluation in a checkpoint's metadata and model card.

    figures: as `evaluate` returns them. Raises CheckpointError if the folder has no metadata or cannot be written.
    """
    content = read_json(checkpoint / METADATA) | {"evaluation": dict(figures)}
    try:
        for name, write in (
            (METADATA, lambda file: write_json(file, content)),
            (MODEL_CARD, lambda file: file.write_text(model_card(content), encoding="utf-8")),
        ):
            part = checkpoint / f".{name}.part"
            write(part)
            part.replace(checkpoint / name)
    except OSError as error:
        raise CheckpointError(f"Cannot write the model card of {checkpoint}: {error}") from error


def markdown_section(title: str, paragraphs: Iterable[str]) -> list[str]:
    """A section with its title, or nothing if it would be empty."""
    found = list(paragraphs)
    return [f"## {title}", *found] if found else []


def _front_matter(meta: Mapping[str, Any]) -> str:
    base_model = meta.get("base_model")
    generates = "encoder" not in meta
    data = ModelCardData(
        library_name="diffusers" if generates else "transformers",
        pipeline_tag="text-to-image" if generates else "zero-shot-image-classification",
        tags=TAGS if generates else [meta["encoder"].lower(), *SEARCH_TAGS],
        **({"base_model": base_model} if base_model else {}),
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(meta: Mapping[str, Any]) -> str:
    if "encoder" in meta:
        return (
            f"A {meta['encoder']} model for searching one product catalog by text and by image, trained with UniDiff "
            f"SDK. It was fine-tuned from {markdown_text(meta['base'])}."
        )
    lines = [
        "A CLIP model and a Stable Diffusion pipeline for one product catalog, trained with UniDiff SDK. CLIP searches "
        "the catalog by text and by image. The pipeline generates product images from text."
    ]
    if "teacher" in meta:
        sampler = meta["sampler"]
        lines.append(
            f"The UNet is distilled from {markdown_text(meta['teacher']['name'])}: it "
            f"generates in {sampler['steps']} denoising steps "
            "without classifier-free guidance."
        )
    elif "base" in meta:
        lines.append(f"Both were fine-tuned together from the base {markdown_text(meta['base'])}.")
    return " ".join(lines)


def describe_additions(meta: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs on the files that were added to the base."""
    loras = [f"{inline_code(lora['name'])} (weight {lora['weight']:g})" for lora in meta.get("loras", ())]
    if loras:
        yield f"Merged LoRA files: {', '.join(loras)}."
    if tokens := [
        f"{inline_code(each['token'])} ({inline_code(each['name'])})" for each in meta.get("textual_inversions", ())
    ]:
        yield f"Tokens of prompts by textual inversion: {', '.join(tokens)}. Search does not know them."
    if meta.get("vae"):
        yield f"VAE: {inline_code(meta['vae'])}."


def describe_data(meta: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs on the training data that the metadata of a checkpoint records."""
    data = meta.get("data")
    if not data:
        return
    skipped = data.get("invalid_rows", 0)
    counted = f"{data['pairs']:,} image-caption pairs" if "pairs" in data else f"{data['captions']:,} captions"
    yield f"{inline_code(data['name'])}: {counted}" + (f"; {skipped:,} invalid rows were skipped." if skipped else ".")
    if columns := data.get("columns"):
        yield f"Columns: {', '.join(map(inline_code, columns))}."


def _recipe(meta: Mapping[str, Any]) -> Iterator[str]:
    yield from describe_additions(meta)
    config = with_current_names(meta.get("config", {}))
    terms = {title: config[f"lambda_{term}"] for term, title in TERM_TITLES.items() if config.get(f"lambda_{term}")}
    if terms:
        yield "The objective is a weighted sum of these terms:"
        yield markdown_table(("term", "weight"), terms.items())
    if meta.get("identity", {}).get("prior"):
        yield f"Prior pairs were trained on as well, with weight {config['lambda_prior']}."
    settings = {title: config[name] for name, title in SETTINGS.items() if config.get(name)} | (
        {"seed": config["seed"]} if "seed" in config else {}
    )
    if settings:
        yield markdown_table(("setting", "value"), settings.items())
    if stages := meta.get("recipe"):
        yield "The parts were trained from scratch:"
        yield markdown_table(("part", "steps", "batch", "peak learning rate"), _stages(stages))
    if "step" in meta and meta["step"] != config.get("steps"):
        yield f"The weights are those after step {meta['step']:,}."
    yield from _choice(meta.get("chosen", {}))


def _stages(stages: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[Any, ...]]:
    for part, stage in stages.items():
        yield part, stage["steps"], stage["batch"], stage["lr"]


def _choice(chosen: Mapping[str, Any]) -> Iterator[str]:
    if stopping := chosen.get("early_stopping"):
        yield f"Early stopping chose the weights of step {stopping['step']:,}."
    for half, sweep in chosen.get("wise_ft", {}).items():
        yield f"WiSE-FT keeps {sweep['alpha']:.0%} of the change of the {half}."


def _results(meta: Mapping[str, Any]) -> Iterator[str]:
    if validation := meta.get("validation"):
        data = f" on {inline_code(validation['data'])}" if validation.get("data") else ""
        weights = "of the chosen weights" if meta.get("chosen") else f"after step {validation['step']:,}"
        yield f"Validation{data} {weights}:"
        figures = {name: value for name, value in validation["figures"].items() if name != "seconds"}
        yield markdown_table(("figure", "value"), _numbers(figures))
    if evaluation := meta.get("evaluation"):
        data = evaluation["data"]
        yield f"Evaluation on {inline_code(data['name'])} ({data['pairs']:,} pairs):"
        yield markdown_table(
            ("figure", "value"), _numbers({name: part for name, part in evaluation.items() if name != "data"})
        )


def describe_limits(meta: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs on intended use and limits."""
    yield (
        "Intended for searching the catalog that it was trained on, or one like it, and for generating images in its "
        "style. Check generated images before you publish them: they can show products that do not exist and can "
        "repeat biases of the base model and of the data. The model contains no safety filter."
    )
    if meta.get("synthetic"):
        yield (
            "The model was trained on rendered synthetic products only. On photographs, its search results and images "
            "are not useful; fine-tune it on your own data first."
        )


def _use(meta: Mapping[str, Any]) -> str:
    if "encoder" in meta:
        return USE_SEARCH.replace("{family}", "Siglip" if meta["encoder"] == "SigLIP" else "CLIP")
    sampler = meta.get("sampler") or {}
    arguments = ""
    if "teacher" in meta:  # a distilled model needs its own number of steps
        arguments = f", num_inference_steps={sampler['steps']}, guidance_scale={sampler['guidance_scale']}"
    prompt = next(iter(meta.get("captions", ())), "a red dress")
    pipeline = meta.get("pipeline", "StableDiffusionPipeline")
    used = USE.replace('"{prompt}"', code_literal(prompt)).replace("{arguments}", arguments)
    absent = "".join(f", {part}=None" for part in meta.get("absent", ()))
    return used.replace("{pipeline}", pipeline).replace("{absent}", absent)


def _numbers(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """All numbers of nested figures, by their path."""
    for name, value in figures.items():
        title = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{title}, ")
        elif isinstance(value, float | int) and not isinstance(value, bool):
            yield title, f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown_text(text: object) -> str:
    """A text in Markdown that shows as it is: one line, without formatting, links, HTML or table cells."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", terminal_safe(text))


def inline_code(text: object) -> str:
    """A text as inline code, in which a backtick cannot be escaped."""
    return f"`{terminal_safe(text).replace('`', chr(39))}`"


def code_literal(text: str) -> str:
    """A text as a string literal of Python. A caption from outside must not become code that a reader copies."""
    return json.dumps(terminal_safe(text).replace('"', "'"), ensure_ascii=False)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(markdown_text, line))} |" for line in lines)
