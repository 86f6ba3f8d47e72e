"""SigLIP as a search-only bundle: texts, images and evidence equal those of transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from support.odd_images import odd_images
from support.siglip import SIZE, TOKENS, make_siglip

from unidiff_export import export_bundle
from unidiff_export.graphs.lowering import encoder_specs
from unidiff_sdk import Catalog
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import Resize

TEXTS = ["a red dress", "", "A photo,  of 日本!", "LONG long </s> long", "unknown ☃ signs", "word " * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip") / "published")


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    export = export_bundle(None, tmp_path_factory.mktemp("export") / "bundle", clip=folder)
    assert [graph.attention_nodes for graph in export.graphs] == [2, 3]  # the pooling head is one node
    return Bundle.open(export.path, threads=1)


def test_manifest_describes_siglip(bundle: Bundle, folder: Path) -> None:
    from transformers import SiglipModel

    model, embedding = SiglipModel.from_pretrained(folder), bundle.manifest.embedding
    assert (bundle.dim, bundle.max_tokens, bundle.image_size) == (32, TOKENS, SIZE)
    assert bundle.image_resize == Resize(SIZE, squash=True)
    assert embedding and embedding.logit_bias == pytest.approx(model.logit_bias.item())
    assert bundle.logit_scale == pytest.approx(model.logit_scale.exp().item())
    assert bundle.manifest.parity["embeddings"]["text_cosine"] > 0.99999


def test_embeddings_equal_those_of_transformers(bundle: Bundle, folder: Path) -> None:
    """The tokens are padded to the length of the model, and its state of the last one is the embedding."""
    from transformers import AutoImageProcessor, AutoModel, PreTrainedTokenizerFast

    model, processor = AutoModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    tokenizer, encoder = PreTrainedTokenizerFast.from_pretrained(folder), Encoder(bundle)
    ids = tokenizer(TEXTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids
    np.testing.assert_array_equal(encoder.tokenize(TEXTS), ids.numpy())
    lengths = [len(each) for each in tokenizer(TEXTS, verbose=False).input_ids]
    assert encoder.too_long(TEXTS) == [text for text, n in zip(TEXTS, lengths, strict=True) if n > TOKENS] != []
    images = odd_images(24)
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids)
        features = model.get_image_features(**processor(images, return_tensors="pt"))
    for ours, theirs in ((encoder.encode_texts(TEXTS), texts), (encoder.encode_images(images), features)):
        expected = torch.nn.functional.normalize(getattr(theirs, "pooler_output", theirs), dim=-1).numpy()
        assert (ours * expected).sum(axis=1).min() > 0.9999


def test_sentencepiece_is_compared_without_leading_punctuation() -> None:
    from types import SimpleNamespace

    from unidiff_export.pipeline import ODD_TEXTS, comparable_texts

    assert comparable_texts(SimpleNamespace(backend_tokenizer=None)) == ODD_TEXTS
    differing = [(ours, odd) for ours, odd in zip(comparable_texts(object()), ODD_TEXTS, strict=True) if ours != odd]
    assert differing == [("🙂 12.5%", "! !! 🙂 12.5%")]


def test_modules_of_the_graphs_equal_the_model(folder: Path) -> None:
    """Also for a batch of one, and with the weights of the pooling head in separate layers."""
    from transformers import SiglipModel

    model = SiglipModel.from_pretrained(folder).eval()
    text, image = encoder_specs(model)
    with torch.no_grad():
        for batch in (1, 3):
            (ids,), (pixels,) = text.example(batch, 1), image.example(batch, 1)
            theirs = model.text_model(input_ids=ids).pooler_output
            torch.testing.assert_close(text.module(ids), theirs, atol=1e-5, rtol=1e-4)
            theirs = model.vision_model(pixel_values=pixels).pooler_output
            torch.testing.assert_close(image.module(pixels), theirs, atol=1e-5, rtol=1e-4)


def test_catalog_searches(bundle: Bundle, small_catalog: Path) -> None:
    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add_folder(small_catalog)
        assert catalog.search(image=small_catalog / "3.png", limit=1)[0].score == pytest.approx(1, abs=1e-4)
        assert len(catalog.search("a red dress", limit=5)) == 5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_200_odd_images_have_the_embeddings_of_transformers(
    kind: str, random_checkpoint: Path, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor, AutoModel

    source = folder if kind == "siglip" else random_checkpoint / "clip"
    encoder = Encoder(Bundle.open(export_bundle(None, tmp_path / "bundle", clip=source).path, threads=1))
    model, processor = AutoModel.from_pretrained(source).eval(), AutoImageProcessor.from_pretrained(source)
    images = odd_images(200, seed=1)
    with torch.no_grad():
        features = model.get_image_features(**processor(images, return_tensors="pt"))
    expected = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1).numpy()
    cosines = (encoder.encode_images(images) * expected).sum(axis=1)
    assert cosines.min() > 0.9999, images[int(cosines.argmin())]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [("tensorrt", "fp32"), ("cuda", "fp16"), ("portable", "fp16")])
def test_other_targets(folder: Path, tmp_path: Path, target: str, precision: str) -> None:
    export = export_bundle(None, tmp_path / "bundle", clip=folder, target=target, precision=precision)
    assert [graph.attention_nodes for graph in export.graphs] == [2, 3]
