"""The model card of a bundle: its front matter, its figures, and that users may edit it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

from huggingface_hub import ModelCard

from unidiff_export import Export, export_bundle
from unidiff_export.bundle.model_card import license_of, model_card
from unidiff_sdk.inference.bundle import TINY, Bundle
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

META = {
    "name": "shop",
    "base": "some/model",
    "base_model": ["some/model", "some/clip"],
    "captions": ['a "red" dress'],
    "data": {"name": "products", "pairs": 1200, "invalid_rows": 3, "columns": ["price"]},
}


@pytest.fixture(scope="module")
def export(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    checkpoint = load_checkpoint(random_checkpoint)
    checkpoint.meta.update(META)
    return export_bundle(checkpoint, tmp_path_factory.mktemp("card") / "bundle")


def test_export_writes_a_card_with_the_figures_of_the_manifest(export: Export) -> None:
    card = ModelCard.load(export.path / "README.md", ignore_metadata_errors=False)
    assert card.data.library_name == "unidiff-sdk" and card.data.pipeline_tag == "text-to-image"
    assert {"clip", "fp32", "onnx"} <= set(card.data.tags)
    assert card.data.base_model == META["base_model"] and card.data.license is None
    text = card.text
    assert "# bundle" in text and "checkpoint `shop` in fp32 for ONNX Runtime on a CPU" in text
    assert "Fine-tuned from the base some/model." in text and "`products`: 1,200 image-caption pairs" in text
    for graph in export.graphs:
        assert f"| {graph.name} | fp32 | {graph.bytes / 1e6:.1f} MB |" in text
        assert f"| {graph.name} | {graph.parity.max_abs_error:.1e} | {graph.parity.cosine:.5f} |" in text
    assert f"| PSNR of the worst image | {export.image.psnr_db:.1f} dB | ≥ 45 dB |" in text
    assert f"| R@1 over 1 pairs | {export.search.recall_at_1:.1%} |" in text
    assert "sampler ddim, 20 steps, guidance scale 5" in text and "32 px for generated images" in text
    assert "Devices: cpu, cuda." in text and "rendered synthetic products only" in text
    assert 'Catalog("shop.catalog", bundle="BUNDLE")' in text and "catalog.search(\"a 'red' dress\")" in text
    assert 'ORTDiffusionPipeline.from_pretrained("BUNDLE")' in text
    assert "{" not in text and "None" not in text


def test_card_can_be_edited_or_removed_without_changing_the_bundle(export: Export) -> None:
    card, manifest = export.path / "README.md", json.loads((export.path / "manifest.json").read_text())
    assert "README.md" not in manifest["files"]
    fingerprint = Bundle.open(export.path).fingerprint
    card.write_text("Our own words.", encoding="utf-8")
    assert Bundle.open(export.path).fingerprint == fingerprint
    card.unlink()
    assert Bundle.open(export.path).fingerprint == fingerprint


def test_card_of_a_bundle_for_a_gpu_opens_it_there() -> None:
    manifest = replace(Manifest.read(TINY), devices=("cuda",), target="cuda", precision="int8", parity=None)
    card = ModelCard(model_card(manifest, {}, "tiny", "mit"))
    assert card.data.license == "mit" and card.data.base_model is None
    assert 'bundle=Bundle.open("BUNDLE", device="cuda")' in card.text
    assert 'from_pretrained("BUNDLE", provider="CUDAExecutionProvider")' in card.text
    assert "int8 is fast on CPUs with VNNI" in card.text
    assert "## Comparison with PyTorch" not in card.text and "## Training\n" not in card.text


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags:\n- art\n---\n# Model\n", "creativeml-openrail-m"),
        ('---\ntags: [a]\nlicense: "mit"\n---\n', "mit"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("---\n: [damaged\n---\n", None),
        ("license: mit\n", None),
        (None, None),
    ],
)
def test_license_comes_from_the_card_of_the_checkpoint(card: str | None, license: str | None, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert license_of(tmp_path) == license
