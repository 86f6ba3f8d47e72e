"""A bundle without a generator: what it is exported from, compared with, and which files it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unidiff_export.graphs.lowering import GraphSpec, encoder_specs
from unidiff_export.pipeline import ImageArray, Inputs, embed_search_model, unit
from unidiff_export.quantization.calibration import calibrate_on
from unidiff_export.quantization.policy import Int8Policy
from unidiff_export.reference import LARGE, Samples, SearchReference, distinct
from unidiff_sdk._internal.images import load_image
from unidiff_sdk._internal.warnings import warn
from unidiff_sdk.datasets.reader import read_catalog
from unidiff_sdk.errors import DataError, ExportError, ImageError
from unidiff_sdk.inference.manifest import Embedding, Manifest, ModelDescription
from unidiff_sdk.training.checkpoints.encoders.search_model import SearchModel
from unidiff_sdk.training.data.captions import tokenize

from .exported import Exported, Progress
from .files import write_tokenizer
from .model_card import write_model_card

# Pairs for verification and, of a large model, fewer; as many again calibrate int8.
PAIRS, PAIRS_OF_LARGE = 200, 64
# Larger images of pairs are reduced to this side, so that all of them fit into memory.
LARGEST_SIDE = 512


def export_search_model(
    model: SearchModel,
    calibration: str | Path | None,
    columns: Mapping[str, str | None] | None,
    precision: str,
    report: Progress,
) -> Exported:
    """Compute what the encoders are compared with, and for int8 calibrate them.

    Args:
        model: the encoders.
        calibration: a catalog of pairs to compare search on and to calibrate with. int8 needs it.
        columns: names of its columns.
        precision: of the bundle.
        report: called with one line at the start of each stage.

    Raises:
        ExportError: int8 without pairs, or transformers cannot embed.
        DataError: `calibration` is not a catalog, or holds no valid pair.
    """
    patches = model.image_input().patches
    specs = encoder_specs(model.model, patches=patches.count if patches else 1)
    pairs, policy, calibrating = _pairs(model, calibration, columns), None, None
    if precision == "int8":
        pairs, calibrating = _split(pairs)
    report("Embedding texts and images with transformers")
    reference = search_reference(model, specs, pairs)
    if calibrating is not None:
        report("Calibrating int8")
        policy = Int8Policy(specs, calibrate_on(specs, _inputs(model, calibrating)))
    config = model.model.config
    return Exported(
        specs=specs,
        configs={"text_encoder": config.text_config, "image_encoder": config.vision_config},
        description=describe_search_model(model),
        reference=reference,
        policy=policy,
        write_files=partial(write_search_files, model),
        write_card=partial(_write_card, model),
        modules=(model.model,),
    )


def search_reference(
    model: SearchModel, specs: Sequence[GraphSpec], pairs: Samples | None, from_disk: bool = True
) -> SearchReference:
    """Embed the pairs, if there are some, and unusual texts and images with PyTorch.

    Unusual inputs are embedded by transformers with the model's own folder, or with the model in memory unless
    `from_disk`.
    """
    odd = embed_search_model(model, from_disk)
    if pairs is None:
        samples = Samples(odd.texts, tuple(np.asarray(image.convert("RGB")) for image in odd.images))
        return SearchReference(searched=None, embeddings=None, odd=odd, inputs=_inputs(model, samples))
    modules, inputs = {spec.name: spec.module for spec in specs}, _inputs(model, pairs)
    with torch.no_grad():
        texts, images = (
            np.concatenate([unit(modules[name](*call)) for call in inputs[name]])
            for name in ("text_encoder", "image_encoder")
        )
    return SearchReference(searched=pairs, embeddings=(texts, images), odd=odd, inputs=inputs)


def describe_search_model(model: SearchModel) -> ModelDescription:
    """What the runtime needs of the encoders: sizes, normalization, temperature."""
    logit_bias = model.model.logit_bias.item() if model.is_siglip else None
    return ModelDescription(
        embedding=Embedding(
            dim=model.dim,
            max_tokens=model.model.config.text_config.max_position_embeddings,
            logit_scale=model.model.logit_scale.exp().item(),
            logit_bias=logit_bias,
        ),
        image=model.image_input(),
        synthetic=bool(model.meta.get("synthetic", False)),
    )


def write_search_files(model: SearchModel, folder: Path) -> None:
    """Write the files that are not graphs: tokenizer and image preprocessing."""
    write_tokenizer(model.tokenizer, folder / "tokenizer")
    model.image_processor.save_pretrained(folder / "image_encoder")


def _write_card(model: SearchModel, folder: Path, manifest: Manifest) -> None:
    write_model_card(folder, manifest, model.meta, model.path)


# --- pairs -----------------------------------------------------------------------------------------------------------


def _pairs(
    model: SearchModel, calibration: str | Path | None, columns: Mapping[str, str | None] | None
) -> Samples | None:
    """The pairs of a catalog that are compared. None without a catalog."""
    if calibration is None:
        return None
    limit = PAIRS_OF_LARGE if model.model.num_parameters() > LARGE else PAIRS
    pairs = dict(islice(_valid_pairs(calibration, columns), limit))
    if not pairs:
        raise DataError(f"{calibration} holds no valid image-caption pair. Name a folder of images with captions.")
    captions = distinct(tuple(pairs))
    return Samples(captions, tuple(pairs[caption] for caption in captions))


def _valid_pairs(calibration: str | Path, columns: Mapping[str, str | None] | None) -> Iterator[tuple[str, ImageArray]]:
    for row in read_catalog(calibration, columns=columns):
        try:
            image = load_image(row.image())
        except (ImageError, DataError) as error:
            warn(f"{calibration}, line {row.line}: the pair is skipped. {error}")
            continue
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.BICUBIC)
        yield row.text, np.asarray(image)


def _split(pairs: Samples | None) -> tuple[Samples, Samples]:
    """Pairs for verification, and other ones for calibration."""
    if pairs is None or len(pairs.captions) < 2:
        raise ExportError(
            "int8 needs images with captions to calibrate on. Pass --calibration DATA, a folder of your images with at "
            "least 2 different captions."
        )
    return pairs.split(len(pairs.captions) // 2)


def _inputs(model: SearchModel, samples: Samples) -> dict[str, tuple[Inputs, ...]]:
    """The inputs of both graphs, one call for each pair."""
    assert samples.images is not None  # only pairs are passed
    ids = tokenize(model.tokenizer, samples.captions)
    prepared = (model.image_processor(image, return_tensors="pt") for image in samples.images)
    names = model.image_processor.model_input_names
    return {
        "text_encoder": tuple((each[None],) for each in ids),
        "image_encoder": tuple(tuple(each[name] for name in names) for each in prepared),
    }
