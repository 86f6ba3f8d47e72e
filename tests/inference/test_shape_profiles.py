from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from support.recorded import RecordedSession, recorded_session
from support.toy_bundle import make_toy_bundle

from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import Embedding, Latent, ModelDescription, Prompt, SamplerDefaults, TensorSpec
from unidiff_sdk.inference.sessions import create_session
from unidiff_sdk.inference.shape_profiles import ProfiledSession, shape_profile


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy"), threads=1)


def unet_feeds(batch: int, side: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "sample": rng.standard_normal((batch, 4, side, side), dtype=np.float32),
        "timestep": np.linspace(10, 900, batch, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 12, 8), dtype=np.float32),
    }


def test_profile_of_stable_diffusion() -> None:
    """512 pixels, latents of 64 x 64, 77 tokens; SD 2 searches with another text encoder of another length."""
    model = ModelDescription(
        latent=Latent(channels=4, size=64, scale_factor=8, scaling_factor=0.18215, shift_factor=0.0),
        embedding=Embedding(dim=768, max_tokens=50),
        prompt=Prompt(77),
        sampler=SamplerDefaults("ddim", 20, 5.0),
    )
    unet = {
        "sample": TensorSpec("float32", ("batch", 4, "height", "width")),
        "timestep": TensorSpec("float32", ("steps",)),
        "encoder_hidden_states": TensorSpec("float32", ("batch", "tokens", 768)),
    }
    assert shape_profile("unet", unet, model) == {
        "sample": {"min": [1, 4, 32, 32], "opt": [2, 4, 64, 64], "max": [2, 4, 96, 96]},
        "timestep": {"min": [1], "opt": [2], "max": [2]},
        "encoder_hidden_states": {"min": [1, 77, 768], "opt": [2, 77, 768], "max": [2, 77, 768]},
    }
    ids = {"input_ids": TensorSpec("int64", ("batch", "tokens"))}
    assert shape_profile("text_encoder", ids, model)["input_ids"]["max"] == [32, 77]
    assert shape_profile("clip_text_encoder", ids, model)["input_ids"]["max"] == [32, 50]
    images = {"sample": TensorSpec("float32", ("batch", 3, "height", "width"))}
    assert shape_profile("vae_encoder", images, model)["sample"]["opt"] == [1, 3, 512, 512]

    with pytest.raises(BundleError, match=r"names the axis '4'.*unet.*Known axes: batch, "):
        shape_profile("unet", {"sample": TensorSpec("float32", ("batch", "4"))}, model)


def test_batches_are_split_to_fit_the_engine(toy: Bundle) -> None:
    plain, profile = create_session(toy.path / "unet" / "model.onnx", threads=1), toy.profile("unet")
    assert profile is not None and profile["sample"]["max"] == [64, 4, 12, 12]
    profile = {
        name: {key: [min(shape[0], 3), *shape[1:]] for key, shape in bounds.items()} for name, bounds in profile.items()
    }
    recorded, feeds = RecordedSession(plain), unet_feeds(7)
    profiled = ProfiledSession(recorded, profile)
    expected = plain.run(feeds)["out_sample"]
    np.testing.assert_allclose(profiled.run(feeds, ["out_sample"])["out_sample"], expected, atol=1e-6)
    assert [shapes["timestep"] for shapes in recorded.shapes] == [(3,), (3,), (1,)]
    with pytest.raises(OptionError, match=r"sample has the shape \[2, 4, 16, 16\], but the TensorRT engine accepts"):
        profiled.run(unet_feeds(2, side=16))


class Scaled:
    """A session that multiplies its inputs."""

    inputs: ClassVar[dict[str, TensorSpec]] = {}
    outputs: ClassVar[dict[str, TensorSpec]] = {}
    providers, captured = (), False

    def run(self, feeds: Any, outputs: Any = None) -> dict[str, np.ndarray]:
        return {"scaled": feeds["sample"] * feeds["timestep"]}


def test_one_timestep_for_all_samples_is_passed_with_each_part() -> None:
    sizes = {"min": [1], "opt": [1], "max": [2]}
    recorded = RecordedSession(Scaled())
    profiled = ProfiledSession(recorded, {"sample": sizes, "timestep": sizes})
    result = profiled.run({"sample": np.arange(3), "timestep": np.array([5])})
    assert result["scaled"].tolist() == [0, 5, 10]
    assert recorded.shapes == [{"sample": (2,), "timestep": (1,)}, {"sample": (1,), "timestep": (1,)}]


def test_profile_covers_what_the_generator_calls(toy: Bundle) -> None:
    def within_profile(file: Path, *, profile: Any, **options: Any) -> ProfiledSession:
        return ProfiledSession(recorded_session(file, profile=profile, **options), profile)

    generator = Generator(Bundle(toy.path, toy.manifest, threads=1, session_factory=within_profile))
    for width, height in ((None, None), (8, 8), (24, 24), (16, 8)):
        assert len(generator.generate(["a coat", "boots"], n=9, steps=1, width=width, height=height)) == 18
    with pytest.raises(OptionError, match="choose another size, or open the bundle with device='cuda'"):
        generator.generate("a coat", steps=1, width=32, height=32)
