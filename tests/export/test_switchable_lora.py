"""LoRAs that stay switchable: images equal those of diffusers with `set_adapters`, and of the base without a LoRA."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

import torch
from click.testing import CliRunner
from support.lora_files import make_lora
from support.random_checkpoint import CAPTIONS
from support.random_sdxl import make_random_sdxl

from unidiff_export import export_bundle
from unidiff_export.verification import TOLERANCES, psnr_db
from unidiff_sdk import Catalog
from unidiff_sdk.cli.main import main
from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.generation.options import GenerationOptions
from unidiff_sdk.generation.provenance import read_recipe
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder

PROMPTS = list(CAPTIONS[:2])
SETTINGS = {"steps": 4, "sampler": "euler", "guidance_scale": 4.0}


@pytest.fixture(scope="module")
def loras(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One of the UNet and the text encoder, by kohya, and one of the UNet alone, by peft."""
    folder = tmp_path_factory.mktemp("loras")
    make_lora(random_checkpoint, folder / "shoes.safetensors", form="kohya", seed=1)
    make_lora(random_checkpoint, folder / "light.safetensors", form="peft", text=False, seed=2)
    return [folder / "shoes.safetensors", folder / "light.safetensors"]


@pytest.fixture(scope="module")
def folder(random_checkpoint: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = [loras[0], f"{loras[1]}:0.7"]
    out = tmp_path_factory.mktemp("export") / "bundle"
    return export_bundle(random_checkpoint, out, lora=names, lora_switchable=True).path


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder, threads=1)


def noise(images: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((images, 4, 16, 16), dtype=np.float32)


def by_diffusers(checkpoint: Path, files: list[Path], weights: list[float]) -> list[np.ndarray]:
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    for number, file in enumerate(files):
        pipeline.load_lora_weights(str(file), adapter_name=f"lora{number}")
    if files:
        pipeline.set_adapters([f"lora{number}" for number in range(len(files))], weights)
    latents = torch.from_numpy(noise(len(PROMPTS)))
    images = pipeline(PROMPTS, latents=latents, num_inference_steps=4, guidance_scale=4.0).images
    return [np.asarray(image) for image in images]


def generated(bundle: Bundle, **options: object) -> list[np.ndarray]:
    images = Generator(bundle).generate(PROMPTS, latents=noise(len(PROMPTS)), **SETTINGS, **options)
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize(
    "weights",
    [(1.0, None), (None, 0.7), (0.4, -1.5)],
    ids=["text-and-unet", "unet", "both"],
)
def test_images_equal_those_of_diffusers(
    bundle: Bundle, random_checkpoint: Path, loras: list[Path], weights: tuple[float | None, ...]
) -> None:
    chosen = {file: weight for file, weight in zip(loras, weights, strict=True) if weight is not None}
    expected = by_diffusers(random_checkpoint, list(chosen), list(chosen.values()))
    ours = generated(bundle, lora={file.stem: weight for file, weight in chosen.items()})
    base = by_diffusers(random_checkpoint, [], [])
    for image, reference, plain in zip(ours, expected, base, strict=True):
        found, changed = psnr_db(image, reference), psnr_db(plain, reference)
        assert found >= 40 > changed, "equal to diffusers, and changed by the LoRA"


def test_without_a_lora_everything_equals_the_base(bundle: Bundle, random_checkpoint: Path, tmp_path: Path) -> None:
    base = Bundle.open(export_bundle(random_checkpoint, tmp_path / "base").path, threads=1)
    for ours, theirs in zip(generated(bundle), generated(base), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(Encoder(bundle).encode_texts(PROMPTS), Encoder(base).encode_texts(PROMPTS))
    assert not bundle.has_graph("clip_text_encoder"), "search and prompts still share one text encoder"


def test_weight_of_the_export_is_the_default(bundle: Bundle) -> None:
    for ours, stated in zip(generated(bundle, lora="light"), generated(bundle, lora={"light": 0.7}), strict=True):
        np.testing.assert_array_equal(ours, stated)
    both = generated(bundle, lora=["light", "shoes"])
    for ours, stated in zip(both, generated(bundle, lora={"shoes": 1, "light": 0.7}), strict=True):
        np.testing.assert_array_equal(ours, stated)


def test_requests_with_different_loras_share_no_call(bundle: Bundle) -> None:
    """Three threads at once, each with its own LoRA, receive the images that they receive alone."""
    choices: list[dict[str, float] | None] = [None, {"shoes": 1.0}, {"light": 0.7}]
    alone = [generated(bundle, lora=choice) for choice in choices]
    generator, together, barrier = Generator(bundle), {}, threading.Barrier(len(choices))

    def request(number: int) -> None:
        barrier.wait()
        images = generator.generate(PROMPTS, latents=noise(2), lora=choices[number], **SETTINGS)
        together[number] = [np.asarray(image) for image in images]

    threads = [threading.Thread(target=request, args=[number]) for number in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for number, images in enumerate(alone):
        for image, expected in zip(together[number], images, strict=True):
            np.testing.assert_array_equal(image, expected)


def test_manifest_and_recipe_record_the_loras(bundle: Bundle, folder: Path, tmp_path: Path) -> None:
    assert bundle.loras == ("shoes", "light")
    shoes, light = bundle.manifest.loras.values()
    assert set(shoes.files) == {"text_encoder", "unet"} and set(light.files) == {"unet"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "LoRAs that a generation can switch on: `shoes` (weight 1), `light` (weight 0.7)." in card
    assert (shoes.weight, light.weight) == (1.0, 0.7) and min(shoes.psnr_db, light.psnr_db) >= 45
    with Catalog(tmp_path / "shop.catalog", bundle=folder) as catalog:
        (image,) = catalog.generate("a red dress", seed=3, steps=2, lora={"light": 0.5})
        image.save(tmp_path / "image.png")
        recipe = read_recipe(tmp_path / "image.png")
        assert recipe.arguments["lora"] == {"light": 0.5}
        (again,) = catalog.generate(**recipe.arguments)
        np.testing.assert_array_equal(np.asarray(again.image), np.asarray(image.image))
        (plain,) = catalog.generate(**recipe.arguments | {"lora": None})
        assert "lora" not in plain.recipe and np.asarray(plain.image).tobytes() != np.asarray(image.image).tobytes()
        catalog.add([image.image], ["a red dress"], ["generated"], [image.payload])
        assert catalog.get("generated").payload["lora"] == ["light:0.5"]
    out = ["-o", tmp_path / "images", "--steps", 2, "--seed", 3, "--json"]
    call = ["generate", "a red dress", "--bundle", folder, "--lora", "light:0.5", *out]
    result = CliRunner().invoke(main, list(map(str, call)))
    assert result.exit_code == 0, result.output
    (file,) = (each for each in (tmp_path / "images").glob("*.png") if each.stem != "contact-sheet")
    assert read_recipe(file).arguments["lora"] == {"light": 0.5}


def test_adapters_are_those_of_onnx_runtime(bundle: Bundle, folder: Path) -> None:
    """The file and the graph work with `LoraAdapter` and `add_active_adapter` alone."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "unet" / "model.onnx"))
    rng = np.random.default_rng(0)
    shape = bundle.profile("unet")["encoder_hidden_states"]["opt"][1:]
    feeds = {
        "sample": noise(2),
        "timestep": np.array([500.0, 20.0], np.float32),
        "encoder_hidden_states": rng.standard_normal((2, *shape), dtype=np.float32),
    }
    adapter, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    adapter.Load(str(folder / bundle.manifest.loras["light"].files["unet"]))
    options.add_active_adapter(adapter)
    (theirs,) = session.run(None, feeds, options)
    ours = bundle.session("unet").run(feeds | dict(bundle.adapters.inputs("unet", (("light", 1.0),))))["out_sample"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("boots", r"no switchable LoRA 'boots'. It has shoes, light. Export one"),
        ({"shoes": 0}, "the weight 0; give a number that is not 0 and at most ±10"),
        ({"shoes": 11}, "the weight 11"),
        ({"shoes": float("nan")}, "the weight nan"),
        ({"shoes": "1"}, "the weight '1'"),
        ([3], "lora names 3"),
    ],
)
def test_bad_loras_are_refused(bundle: Bundle, lora: object, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Generator(bundle).generate("red", lora=lora)


def test_bundle_without_loras_says_how_to_get_one(toy: Path) -> None:
    generator = Generator(Bundle.open(toy, threads=1))
    with pytest.raises(OptionError, match=r"It has none\. Export one with unidiff-export --lora FILE --lora-sw"):
        generator.resolve(GenerationOptions(lora="shoes"))


def test_exports_that_cannot_switch_are_refused(random_checkpoint: Path, loras: list[Path], tmp_path: Path) -> None:
    def export(*files: Path, **options: object) -> None:
        export_bundle(random_checkpoint, tmp_path / "bundle", lora=files, lora_switchable=True, **options)

    for target in ("tensorrt", "cuda", "web"):
        with pytest.raises(OptionError, match=f"target {target} has no optional inputs"):
            export(*loras, target=target)
    with pytest.raises(OptionError, match="int8 is calibrated for one set of weights"):
        export(*loras, precision="int8")
    with pytest.raises(OptionError, match="no effect without a LoRA"):
        export()
    with pytest.raises(OptionError, match="Several LoRAs are named 'shoes'"):
        export(loras[0], loras[0])
    odd = tmp_path / "my shoes.safetensors"
    odd.write_bytes(loras[0].read_bytes())
    with pytest.raises(OptionError, match="'my shoes' cannot be switched by this name"):
        export(odd)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "target"), [("fp32", "portable"), ("fp16", "cpu")], ids=["portable", "fp16"])
def test_stable_diffusion_xl_switches_in_both_text_encoders(precision: str, target: str, tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    folder, file = make_random_sdxl(tmp_path / "xl"), tmp_path / "shoes.safetensors"
    (folder / "unidiff.json").write_text(json.dumps({"captions": list(CAPTIONS)}))
    make_lora(folder, file, form="kohya", seed=1)
    options = {"precision": precision, "target": target}
    export = export_bundle(folder, tmp_path / "bundle", lora=[file], lora_switchable=True, **options)
    bundle = Bundle.open(export.path, threads=1)
    assert set(bundle.manifest.loras["shoes"].files) == {"text_encoder", "text_encoder_2", "unet"}
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    settings = {"latents": torch.from_numpy(noise(2)), "num_inference_steps": 4, "guidance_scale": 4.0}
    plain = pipeline(PROMPTS, **settings).images
    pipeline.load_lora_weights(str(file), adapter_name="shoes")
    pipeline.set_adapters(["shoes"], [0.8])
    expected = pipeline(PROMPTS, **settings).images
    ours = generated(bundle, lora={"shoes": 0.8})
    least = 40 if precision == "fp32" else TOLERANCES["fp16"].image_psnr_db
    for image, reference, without in zip(ours, map(np.asarray, expected), map(np.asarray, plain), strict=True):
        assert psnr_db(image, reference) >= least > psnr_db(without, reference)


def test_damaged_adapter_is_an_error_of_the_bundle(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    file = copy / json.loads((copy / "manifest.json").read_text())["loras"]["light"]["files"]["unet"]
    file.write_bytes(file.read_bytes()[:200])
    damaged = Bundle.open(copy, threads=1, verify=False)
    with pytest.raises(BundleError, match="cannot read this adapter"):
        Generator(damaged).generate("red", lora="light", steps=1)
    with pytest.raises(BundleError, match="was changed after the export"):
        Bundle.open(copy, threads=1)
