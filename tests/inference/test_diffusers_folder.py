"""A folder as optimum exports it, here with toy graphs: it generates the same images as our own bundle.

Folders that optimum itself wrote are tested in test_optimum.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk import Catalog
from unidiff_sdk.errors import BundleError, GenerationError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder, load_tokenizer, token_ids
from unidiff_sdk.inference.tokenizer import clip_tokenizer

onnx = pytest.importorskip("onnx", reason="needs the export extra")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no manifest.json:UserWarning")

CONFIGS: dict[str, dict[str, Any]] = {
    "model_index.json": {"_class_name": "ORTStableDiffusionPipeline"},
    "text_encoder/config.json": {"max_position_embeddings": 12},
    "unet/config.json": {
        "in_channels": 4,
        "sample_size": 8,
        "cross_attention_dim": 8,
        "block_out_channels": [4, 4],
        "class_embed_type": None,
    },
    "vae_decoder/config.json": {"block_out_channels": [4, 4], "scaling_factor": 0.5, "shift_factor": None},
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy"), threads=1)


def as_exported_by_optimum(bundle: Bundle, folder: Path) -> Path:
    """The toy bundle as optimum writes one: a single timestep, mean and variance from the VAE encoder, no manifest."""
    shutil.copytree(bundle.path, folder)
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "image_encoder")
    for name, config in CONFIGS.items():
        (folder / name).write_text(json.dumps(config))
    unet = onnx.load(folder / "unet" / "model.onnx")
    timestep = next(value for value in unet.graph.input if value.name == "timestep")
    timestep.name = "renamed"
    timestep.type.tensor_type.ClearField("shape")
    timestep.type.tensor_type.shape.SetInParent()
    timestep.type.tensor_type.elem_type = onnx.TensorProto.INT64
    make = onnx.helper.make_node
    unet.graph.node.insert(0, make("Cast", ["timestep"], ["float"], to=onnx.TensorProto.FLOAT))
    unet.graph.node.insert(1, make("Reshape", ["float", "one"], ["each"]))
    unet.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1], np.int64), "one"))
    for node in list(unet.graph.node)[2:]:
        node.input[:] = ["each" if name == "timestep" else name for name in node.input]
    timestep.name = "timestep"
    onnx.save(unet, folder / "unet" / "model.onnx")
    encoder = onnx.load(folder / "vae_encoder" / "model.onnx")
    (conv,) = encoder.graph.node
    conv.output[0] = "mean"
    encoder.graph.node.append(make("Concat", ["mean", "mean"], ["latent_parameters"], axis=1))
    encoder.graph.output[0].name = "latent_parameters"
    encoder.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 8
    onnx.save(encoder, folder / "vae_encoder" / "model.onnx")
    text = onnx.load(folder / "text_encoder" / "model.onnx")
    del text.graph.output[1]
    onnx.save(text, folder / "text_encoder" / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def folder(toy: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_exported_by_optimum(toy, tmp_path_factory.mktemp("optimum") / "shop")


def test_folder_generates_the_images_of_our_bundle(toy: Bundle, folder: Path) -> None:
    opened = Bundle.open(folder, threads=1)
    assert (opened.name, opened.precision, opened.prompt_tokens) == ("shop", "fp32", 12)
    assert opened.manifest.latent == toy.manifest.latent
    assert "'shop', fp32, generation only" in repr(opened) and opened.manifest.purpose == "generation only"
    settings: dict[str, Any] = {"n": 3, "seed": 5, "steps": 4, "sampler": "ddim", "guidance_scale": 3.0}
    ours = Generator(toy).generate(["a coat", "boots"], **settings)
    theirs = Generator(opened).generate(["a coat", "boots"], **settings)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_folder_without_hashes_opens_with_a_warning(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    assert not Bundle.open(folder, verify=False).verified and not recwarn.list
    with pytest.warns(UserWarning, match=r"has no manifest\.json, so nothing shows whether its files are complete"):
        assert not Bundle.open(folder).verified


def test_folder_supports_image_to_image(toy: Bundle, folder: Path) -> None:
    settings: dict[str, Any] = {"seed": 5, "steps": 4, "sampler": "ddim", "guidance_scale": 3.0, "strength": 0.6}
    settings["like"] = np.full((16, 16, 3), 90, np.uint8)
    (ours,), (theirs,) = (Generator(bundle).generate("a coat", **settings) for bundle in (toy, Bundle.open(folder)))
    np.testing.assert_array_equal(np.asarray(theirs), np.asarray(ours))


def test_samples_at_different_timesteps_share_a_call(toy: Bundle, folder: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((5, 4, 8, 8), dtype=np.float32),
        "timestep": np.float32([900, 10, 500, 10, 900]),
        "encoder_hidden_states": rng.standard_normal((5, 12, 8), dtype=np.float32),
    }
    ours, theirs = (bundle.session("unet").run(inputs)["out_sample"] for bundle in (toy, Bundle.open(folder)))
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_vae_encoder_returns_the_mean(toy: Bundle, folder: Path) -> None:
    pixels = {"sample": np.random.default_rng(0).standard_normal((2, 3, 16, 16), dtype=np.float32)}
    ours, theirs = (bundle.session("vae_encoder").run(pixels)["latent_sample"] for bundle in (toy, Bundle.open(folder)))
    np.testing.assert_array_equal(theirs, ours)


def test_folder_warms_up(folder: Path) -> None:
    assert [line.graph for line in Bundle.open(folder, threads=1).warmup()] == [
        "text_encoder",
        "unet",
        "vae_decoder",
        "vae_encoder",
    ]


def test_folder_refuses_to_search(folder: Path) -> None:
    encoder = Encoder(Bundle.open(folder))
    for search in (
        lambda: encoder.encode_texts(["a coat"]),
        lambda: encoder.encode_images([np.zeros((8, 8, 3), np.uint8)]),
        lambda: Catalog(":memory:", bundle=folder),
    ):
        with pytest.raises(BundleError, match="without CLIP: it generates, but cannot search, rank or index"):
            search()


def test_fingerprint_depends_on_the_files(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    before = Bundle.open(folder).fingerprint
    assert Bundle.open(tmp_path / "copy").fingerprint == before
    with (tmp_path / "copy" / "unet" / "model.onnx").open("ab") as unet:
        unet.write(b"\x32\x01x")  # a documentation string
    assert Bundle.open(tmp_path / "copy").fingerprint != before


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("unet/config.json", {"addition_embed_type": "text_time"}, r"addition_embed_type text_time\), as SDXL"),
        (
            "vae_decoder/config.json",
            {"block_out_channels": None},
            "lack 'block_out_channels'; export the pipeline again",
        ),
        ("vae_decoder/config.json", {"latents_std": [1.0]}, "the VAE states latents_std"),
        ("scheduler/scheduler_config.json", {"beta_end": "x"}, "beta_end is 'x'"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "odd"}, "timestep_spacing 'odd' is not supported"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "'EDMEulerScheduler' is not"),
        ("unet/config.json", {"sample_size": [8, 16]}, r"sample_size is \[8, 16\]; it must be one number"),
        ("vae_decoder/config.json", {"block_out_channels": True}, "scale_factor is True; it must be an integer from 1"),
        ("vae_decoder/config.json", {"scaling_factor": "x"}, "scaling_factor is 'x'; it must be a number from"),
        ("unet/config.json", {"in_channels": {}}, r"in_channels is \{\}; it must be an integer from 1 to 65536"),
        ("unet/config.json", {"sample_size": 10**9}, "size is 1000000000; it must be an integer from 1 to 65,536"),
        ("unet/config.json", {"cross_attention_dim": -1}, "cross_attention_dim is -1"),
        ("text_encoder/config.json", {"max_position_embeddings": 10**9}, "max_tokens is 1000000000"),
        ("text_encoder/config.json", None, r"text_encoder.config.json: cannot be read as JSON"),
    ],
)
def test_unsupported_or_damaged_configuration_is_named(
    folder: Path, tmp_path: Path, file: str, change: dict[str, Any] | None, message: str
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = {key: value for key, value in (CONFIGS.get(file, {}) | (change or {})).items() if value is not None}
    (tmp_path / "copy" / file).write_text("{" if change is None else json.dumps(config))
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path / "copy")


def test_configuration_is_completed_as_by_diffusers(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    vae = {key: value for key, value in CONFIGS["vae_decoder/config.json"].items() if key != "scaling_factor"}
    (tmp_path / "copy" / "vae_decoder" / "config.json").write_text(json.dumps(vae | {"shift_factor": 0.1}))
    unet = CONFIGS["unet/config.json"] | {"sample_size": [8, 8]}
    (tmp_path / "copy" / "unet" / "config.json").write_text(json.dumps(unet))
    scheduler = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear"}
    (tmp_path / "copy" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    with pytest.warns(
        UserWarning, match=r"the scheduler of the model is PNDMScheduler.*The sampler dpm\+\+2m generates"
    ):
        manifest = Bundle.open(tmp_path / "copy").manifest
    assert (manifest.latent.scaling_factor, manifest.latent.shift_factor, manifest.latent.size) == (0.18215, 0.0, 8)
    assert (manifest.sampler.name, manifest.sampler.replaces) == ("dpm++2m", "PNDMScheduler")


def test_missing_output_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the graph has no output text_embeds; it has last_hidden_state"):
        Bundle.open(folder).session("text_encoder").run({"input_ids": np.zeros((1, 12), np.int64)}, ["text_embeds"])


TEXTS = ["a red dress", "", "Ünïcode — 日本 & <b>tags</b>", "don't   SHOUT\n", "long " * 30, "🙂 12.5% <|endoftext|> x"]


def test_tokenizer_from_vocabulary_and_merges_equals_tokenizer_json(tmp_path: Path) -> None:
    tiny = Bundle.open("tiny").path / "tokenizer"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path)
    ours, theirs = load_tokenizer(tmp_path, 20), load_tokenizer(tiny, 20)
    np.testing.assert_array_equal(token_ids(ours, TEXTS), token_ids(theirs, TEXTS))
    ids, merges = json.loads((tiny / "vocab.json").read_text()), (tiny / "merges.txt").read_text()
    assert clip_tokenizer(ids, merges).get_vocab() == theirs.get_vocab()


def test_tokenizer_that_pads_on_the_left_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Bundle.open("tiny").path / "tokenizer", tmp_path / "tokenizer"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        BundleError, match="the tokenizer pads on the 'left' side, but CLIP needs padding on the 'right'"
    ):
        load_tokenizer(folder, 20)


def test_damaged_vocabulary_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(BundleError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path, 20)


def test_folder_with_a_wrong_vae_is_refused_at_its_first_call(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    config = CONFIGS["vae_decoder/config.json"] | {"block_out_channels": [4, 4, 4]}
    (tmp_path / "copy" / "vae_decoder" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        GenerationError, match=r"vae_decoder returns the shape \[1, 3, 16, 16\], but .* \[1, 3, 32, 32\]"
    ):
        Generator(Bundle.open(tmp_path / "copy")).generate("a coat", steps=1)
