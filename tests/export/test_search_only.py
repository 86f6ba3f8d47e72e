"""Bundles without a generator: exported from a CLIP alone, and compared with transformers."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from unidiff_export import Export, export_bundle
from unidiff_export.cli import main
from unidiff_sdk import Catalog
from unidiff_sdk.errors import BundleError, CheckpointError, ExportError, OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.training.checkpoints.encoders import open_clip
from unidiff_sdk.training.checkpoints.encoders.search_model import load_search_model

TEXTS = ["a red striped dress", "", "a very long caption " * 9]


@pytest.fixture(scope="module")
def clip(random_checkpoint: Path) -> Path:
    return random_checkpoint / "clip"


@pytest.fixture(scope="module")
def export(clip: Path, small_catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    folder = shutil.copytree(clip, tmp_path_factory.mktemp("published") / "shop-clip")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    out = tmp_path_factory.mktemp("export") / "bundle"
    return export_bundle(None, out, clip=folder, calibration=small_catalog, target="portable")


def test_bundle_holds_the_encoders_and_the_evidence(export: Export) -> None:
    bundle = Bundle.open(export.path, threads=1)
    manifest = bundle.manifest
    assert not bundle.generates and manifest.target == "portable"
    assert {name: list(graph.outputs) for name, graph in manifest.graphs.items()} == {
        "text_encoder": ["text_embeds"],
        "image_encoder": ["image_embeds"],
    }
    assert [graph.attention_nodes for graph in export.graphs] == [2, 2]
    assert export.image is None and export.search and export.search.pairs == 11
    assert manifest.parity.keys() == {"text_encoder", "image_encoder", "search", "embeddings"}
    assert manifest.parity["embeddings"]["image_cosine"] > 0.9999
    assert (bundle.max_tokens, bundle.dim, bundle.image_size) == (16, 32, 32)
    assert not (bundle.path / "model_index.json").exists() and not (bundle.path / "scheduler").exists()


def test_embeddings_equal_those_of_transformers(export: Export, clip: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    from unidiff_sdk.training.checkpoints.checkpoint import ImageProcessor

    encoder, model = Encoder(Bundle.open(export.path, threads=1)), CLIPModel.from_pretrained(clip).eval()
    tokenizer, processor = CLIPTokenizer.from_pretrained(clip), ImageProcessor.from_pretrained(clip)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
    ids = tokenizer(TEXTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids)
        images = model.get_image_features(pixel_values=processor(image, return_tensors="pt").pixel_values)
    for ours, theirs in ((encoder.encode_texts(TEXTS), texts), (encoder.encode_images([image]), images)):
        reference = getattr(theirs, "pooler_output", theirs)
        np.testing.assert_allclose(ours, torch.nn.functional.normalize(reference, dim=-1).numpy(), atol=1e-5)


def test_card_states_that_there_is_no_generator(export: Export) -> None:
    card = (export.path / "README.md").read_text(encoding="utf-8")
    assert "exported from the checkpoint `shop-clip`" in card and "It has no generator" in card
    assert "license: mit" in card and "stable-diffusion" not in card and "text-to-image" not in card
    assert "catalog.search(" in card and "catalog.generate(" not in card and "ORTDiffusionPipeline" not in card
    assert "worst embedding of unusual inputs" in card and "None" not in card and "{" not in card


def test_catalog_searches_and_refuses_to_generate(export: Export, small_catalog: Path) -> None:
    with Catalog(":memory:", bundle=export.path) as catalog:
        catalog.add_folder(small_catalog)
        image = small_catalog / "0.png"
        assert catalog.search(image=image, limit=1)[0].score == pytest.approx(1, abs=1e-4)
        with pytest.raises(BundleError, match="has no generator: it searches, but cannot generate"):
            catalog.generate("a red dress")


def test_command_exports_and_reports(clip: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--clip", str(clip), "-o", str(tmp_path / "bundle")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "image_encoder" in result.output and "PSNR" not in result.output and "R@1" not in result.output
    assert Bundle.open(tmp_path / "bundle").manifest.parity.keys() == {"text_encoder", "image_encoder", "embeddings"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, OptionError, r"or a CLIP with --clip for a bundle that only searches"),
        ({"clip": "CLIP", "lora": "x.safetensors"}, CheckpointError, "no LoRA file"),
        ({"clip": "CLIP", "vae": "CLIP"}, OptionError, "belong to a Stable Diffusion"),
        ({"clip": "CLIP", "precision": "int8"}, ExportError, r"int8 needs images with captions.*--calibration"),
        ({"clip": "CLIP", "variant": "fp16"}, CheckpointError, "no weights of the variant 'fp16'"),
        ({"clip": "nowhere"}, CheckpointError, "no checkpoint folder nowhere"),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    clip: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {name: clip if value == "CLIP" else value for name, value in options.items()}
    with pytest.raises(error, match=message):
        export_bundle(None, tmp_path / "bundle", **options)
    assert not (tmp_path / "bundle").exists()


def test_clip_given_as_the_checkpoint_is_named(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no generator\. .* export it with unidiff-export --clip"):
        export_bundle(clip, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("missing", "change", "message"),
    [
        (("tokenizer.json", "vocab.json"), {}, r"has no tokenizer \(tokenizer.json or vocab.json\)"),
        (("preprocessor_config.json",), {}, r"Missing: preprocessor_config.json"),
        ((), {"do_center_crop": False}, r"returns {'shortest_edge': 32}, but the image encoder takes"),
    ],
)
def test_incomplete_folder_is_refused(
    clip: Path, tmp_path: Path, missing: tuple[str, ...], change: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "clip"))
    for name in missing:
        (folder / name).unlink()
    if change:
        file = folder / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_search_model(folder)


def test_fit_of_a_checkpoint_is_kept(random_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "run"))
    file = folder / "unidiff.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fit": "pad"}))
    model = load_search_model(folder / "clip")
    assert (model.fit, model.name) == ("pad", "random")


# --- OpenCLIP

WIDTH, LAYERS, TOKENS, PATCHES = 16, 2, 8, 16
OPEN_CLIP = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 16, "layers": LAYERS, "width": WIDTH, "head_width": 8, "patch_size": 4},
    "text_cfg": {"context_length": TOKENS, "width": WIDTH, "heads": 2, "layers": LAYERS},
}


def open_clip_tensors(vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of an OpenCLIP model."""
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": (PATCHES + 1, WIDTH),
        "visual.conv1.weight": (WIDTH, 3, 4, 4),
        "visual.proj": (WIDTH, 12),
        "token_embedding.weight": (vocabulary, WIDTH),
        "positional_embedding": (TOKENS, WIDTH),
        "text_projection": (WIDTH, 12),
        "logit_scale": (),
    }
    norms = ["visual.ln_pre", "visual.ln_post", "ln_final"]
    for tower in ("visual.transformer", "transformer"):
        for layer in range(LAYERS):
            place = f"{tower}.resblocks.{layer}"
            norms += [f"{place}.ln_1", f"{place}.ln_2"]
            for name, rows, columns in (
                ("attn.in_proj_", 3 * WIDTH, WIDTH),
                ("attn.out_proj.", WIDTH, WIDTH),
                ("mlp.c_fc.", 4 * WIDTH, WIDTH),
                ("mlp.c_proj.", WIDTH, 4 * WIDTH),
            ):
                shapes |= {f"{place}.{name}weight": (rows, columns), f"{place}.{name}bias": (rows,)}
    shapes |= {f"{norm}.{kind}": (WIDTH,) for norm in norms for kind in ("weight", "bias")}
    torch.manual_seed(0)
    return {name: torch.randn(shape) / 4 for name, shape in shapes.items()}


def test_open_clip_folder_is_exported(clip: Path, tmp_path: Path) -> None:
    folder = tmp_path / "openclip"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(clip / name, folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    config = OPEN_CLIP | {"text_cfg": OPEN_CLIP["text_cfg"] | {"vocab_size": vocabulary}}
    content = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(open_clip_tensors(vocabulary), folder / "open_clip_model.safetensors")
    with pytest.warns(UserWarning, match="texts are tokenized as by transformers"):
        bundle = Bundle.open(export_bundle(None, tmp_path / "bundle", clip=f"open_clip:{folder}").path, threads=1)
    assert (bundle.dim, bundle.max_tokens, bundle.image_size) == (12, TOKENS, 16)
    np.testing.assert_array_equal(bundle.image_std, np.float32([0.25] * 3))
    with pytest.warns(UserWarning):
        model = load_search_model(f"open_clip:{folder}")
    ids = model.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        features = model.model.get_text_features(input_ids=ids)
    expected = torch.nn.functional.normalize(getattr(features, "pooler_output", features), dim=-1)
    np.testing.assert_allclose(Encoder(bundle).encode_texts(TEXTS), expected.numpy(), atol=1e-5)


def test_tokenizer_of_open_clip_comes_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds more merges than CLIP uses. Ids follow from the order: symbols, symbols at an end, merges."""
    with gzip.open(tmp_path / open_clip.VOCABULARY, "wt", encoding="utf-8") as file:
        file.write('"bpe_simple_vocab_16e6.txt#version: 0.2\nr e\nre d</w>\nnot used\n')
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(open_clip, "find_spec", lambda name: package)
    monkeypatch.setattr(open_clip, "MERGES", 2)
    tokenizer = open_clip.open_clip_tokenizer()
    assert len(tokenizer) == 256 + 256 + 2 + 2
    start, red, end = tokenizer("red").input_ids
    assert (start, red, end) == (514, 513, 515)
    assert tokenizer("r").input_ids == [514, 256 + ord("r") - ord("!"), 515]
    monkeypatch.setattr(open_clip, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="The tokenizer of this model is defined by open_clip, which is not"):
        open_clip.open_clip_tokenizer()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("target", ["cpu", "portable"])
def test_smaller_precisions(clip: Path, tmp_path: Path, precision: str, target: str) -> None:
    out, data = tmp_path / "bundle", tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for n in range(24):
        Image.fromarray(rng.integers(0, 256, (3 + n, 30, 3), dtype=np.uint8)).save(data / f"{n}.png")
        (data / f"{n}.txt").write_text(" ".join(rng.choice(["red", "DRESS", "日", "12%", "long", "boots"], n + 1)))
    options: dict[str, Any] = {"precision": precision, "target": target, "calibration": data}
    export = export_bundle(None, out, clip=clip, **options)
    assert {graph.precision for graph in export.graphs} == {precision}
    assert export.embeddings.image_cosine >= 0.98 and Bundle.open(out).precision == precision


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_targets_for_gpus(clip: Path, tmp_path: Path, target: str) -> None:
    export = export_bundle(None, tmp_path / "bundle", clip=clip, target=target)
    assert [graph.attention_nodes for graph in export.graphs] == [2, 2]
