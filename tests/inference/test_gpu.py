"""What stands around sessions on a GPU, over real sessions on the CPU: the same buffers and calls, another memory.

Whether a CUDA graph is really captured, or an engine really built, shows only where there is a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.gpu import BoundSession, ProfiledSession
from unidiff_sdk.inference.manifest import Embedding, Latent, ModelDescription, Prompt, SamplerDefaults, TensorSpec
from unidiff_sdk.inference.sessions import create_session
from unidiff_sdk.inference.shape_profiles import shape_profile


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy"), threads=1)


class Counted:
    """A session that notes how it was called."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.runs: list[dict[str, tuple[int, ...]]] = []
        self.bound_runs = 0

    def run(self, outputs: Any, inputs: Any, options: Any = None) -> Any:
        self.runs.append({name: array.shape for name, array in inputs.items()})
        return self.session.run(outputs, inputs, options)

    def run_with_iobinding(self, *arguments: Any) -> None:
        self.bound_runs += 1
        self.session.run_with_iobinding(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def unet_inputs(batch: int, side: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "sample": rng.standard_normal((batch, 4, side, side), dtype=np.float32),
        "timestep": np.linspace(10, 900, batch, dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((batch, 12, 8), dtype=np.float32),
    }


@pytest.mark.parametrize("capture", [False, True])
def test_bound_calls_give_what_ordinary_calls_give(toy: Bundle, capture: bool) -> None:
    import onnxruntime

    plain = create_session(toy.path / "unet" / "model.onnx", threads=1)
    counted = Counted(plain)
    shapes = {name: list(array.shape) for name, array in unet_inputs(2).items()}
    bound = BoundSession(counted, onnxruntime, shapes, device="cpu", capture=capture)
    first = bound.run(["out_sample"], unet_inputs(2, seed=1))[0]
    kept = first.copy()
    second = bound.run(None, unet_inputs(2, seed=2))[0]
    other = bound.run(["out_sample"], unet_inputs(3, side=4))[0]
    for ours, inputs in ((first, unet_inputs(2, seed=1)), (second, unet_inputs(2, seed=2)), (other, unet_inputs(3, 4))):
        np.testing.assert_array_equal(ours, plain.run(None, inputs)[0])
    np.testing.assert_array_equal(first, kept)  # a result does not lie in the buffers
    assert counted.bound_runs == 2
    assert [shapes["sample"][0] for shapes in counted.runs] == [2, 3]  # once to learn the outputs' shapes, once other
    assert bound.get_providers() == ["CPUExecutionProvider"]


def test_bound_calls_take_arrays_that_are_not_contiguous(toy: Bundle) -> None:
    import onnxruntime

    plain = create_session(toy.path / "unet" / "model.onnx", threads=1)
    inputs = unet_inputs(2)
    inputs["sample"] = inputs["sample"].transpose(0, 1, 3, 2)
    bound = BoundSession(plain, onnxruntime, {k: v.shape for k, v in inputs.items()}, device="cpu", capture=False)
    np.testing.assert_array_equal(bound.run(None, inputs)[0], plain.run(None, inputs)[0])


def test_batches_are_cut_to_what_an_engine_takes(toy: Bundle) -> None:
    plain = create_session(toy.path / "unet" / "model.onnx", threads=1)
    counted, profile = Counted(plain), toy.profile("unet")
    assert profile is not None and profile["sample"]["max"] == [64, 4, 12, 12]
    profile = {
        name: {key: [min(shape[0], 3), *shape[1:]] for key, shape in bounds.items()} for name, bounds in profile.items()
    }
    profiled, inputs = ProfiledSession(counted, profile), unet_inputs(7)
    np.testing.assert_allclose(profiled.run(["out_sample"], inputs)[0], plain.run(None, inputs)[0], atol=1e-6)
    assert [shapes["timestep"] for shapes in counted.runs] == [(3,), (3,), (1,)]
    inputs["timestep"] = np.float32([500])  # one for all of them, as optimum passes it
    with pytest.raises(OptionError, match=r"sample has the shape \[2, 4, 16, 16\], but the TensorRT engine takes"):
        profiled.run(None, unet_inputs(2, side=16))


def test_profile_covers_what_the_generator_asks_for(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = toy.session, []

    def session(graph: str) -> ProfiledSession:
        asked.append(graph)
        profile = toy.profile(graph)
        assert profile is not None
        return ProfiledSession(real(graph), profile)

    monkeypatch.setattr(toy, "session", session)
    generator = Generator(toy)
    for width, height in ((None, None), (8, 8), (24, 24), (16, 8)):
        assert len(generator.generate(["a coat", "boots"], n=9, steps=1, width=width, height=height)) == 18
    with pytest.raises(OptionError, match="ask for another size, or open the bundle with device='cuda'"):
        generator.generate("a coat", steps=1, width=32, height=32)
    assert {"unet", "vae_decoder", "text_encoder"} == set(asked)


def test_profile_of_stable_diffusions_sizes() -> None:
    """512 pixels, latents of 64 x 64, 77 tokens; SD 2 searches with another text encoder of other length."""
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


def test_warmup_runs_every_graph_and_reports(toy: Bundle, tmp_path: Path) -> None:
    bundle, said = Bundle.open(toy.path, threads=1), []
    report = bundle.warmup(said.append)
    assert [line.graph for line in report] == list(bundle.manifest.graphs)
    assert said == [f"loading {graph}" for graph in bundle.manifest.graphs]
    for line in report:
        assert line.providers == ("CPUExecutionProvider",)
        assert min(line.load_seconds, line.first_seconds, line.next_seconds) > 0
        assert line.engines_built == 0
        assert bundle.session(line.graph) is bundle.session(line.graph)


def test_warmup_counts_the_engines_that_were_built(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a session that leaves such a file as TensorRT leaves; the building itself needs a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = tmp_path / "unidiff-sdk" / "tensorrt" / "versions" / "bundle-unet" / "unet.engine"
    bundle, said = Bundle(toy.path, toy.manifest, device="tensorrt"), []

    def session(graph: str) -> Any:
        if graph == "unet":
            engine.parent.mkdir(parents=True, exist_ok=True)
            engine.touch()
        return toy.session(graph)

    monkeypatch.setattr(bundle, "session", session)
    assert {line.graph: line.engines_built for line in bundle.warmup(said.append)}["unet"] == 1
    assert {line.engines_built for line in bundle.warmup()} == {0}
    assert "loading unet: TensorRT builds or reads its engine, which takes minutes the first time" in said


def test_warmup_needs_the_shapes(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy", graphs={"unet": {"file": "unet/model.onnx"}})
    with pytest.raises(BundleError, match="does not state the shapes of unet; export it again"):
        Bundle.open(folder).warmup()


def test_a_bundle_for_another_device_is_refused(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy", devices=["cpu", "cuda"])
    Bundle.open(folder, device="cuda")
    with pytest.raises(BundleError, match=r"was exported for cpu, which runs on cpu and cuda; .* --target tensorrt"):
        Bundle.open(folder, device="tensorrt")
