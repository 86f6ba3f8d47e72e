"""OpenVINO as the engine: the results of ONNX Runtime, and errors in our words."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.datasets.synthetic import products, render
from unidiff_sdk.errors import BundleError, OptionError, ProviderError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.engines.openvino_runtime import OpenVinoSession, _core, create_openvino_session
from unidiff_sdk.inference.sessions import create_session

openvino = pytest.importorskip("openvino", reason="needs the openvino extra")

has_bfloat16 = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bfloat16 = pytest.mark.skipif(not has_bfloat16, reason="needs a processor with bfloat16")
PROMPT = "purple dotted boots"


@pytest.fixture(scope="module")
def reference() -> Bundle:
    return Bundle.open("tiny", threads=1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open("tiny", threads=1, device="openvino")


def feeds_of(bundle: Bundle, graph: str, batch: int) -> dict[str, np.ndarray]:
    """Random inputs of the usual sizes."""
    rng = np.random.default_rng(0)
    profile, described = bundle.profile(graph), bundle.manifest.graphs[graph]
    assert profile is not None
    feeds = {}
    for name, bounds in profile.items():
        shape, dtype = (batch, *bounds["opt"][1:]), described.inputs[name].dtype
        if dtype == "int64":
            feeds[name] = rng.integers(1, 800, shape)
        else:
            feeds[name] = np.full(shape, 500.0, np.float32) if name == "timestep" else rng.normal(size=shape)
            feeds[name] = feeds[name].astype(dtype)
    return feeds


@pytest.mark.parametrize("graph", ["text_encoder", "image_encoder", "unet", "vae_decoder", "vae_encoder"])
def test_graphs_have_the_outputs_of_onnx_runtime(bundle: Bundle, reference: Bundle, graph: str) -> None:
    for batch in (1, 3):
        feeds = feeds_of(bundle, graph, batch)
        ours, theirs = bundle.session(graph).run(feeds), reference.session(graph).run(feeds)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            np.testing.assert_allclose(ours[name], expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)
    assert bundle.session(graph).providers == ("openvino:CPU, f32",)
    described = bundle.session(graph), reference.session(graph)
    assert described[0].inputs.keys() == described[1].inputs.keys()
    assert all(described[0].inputs[name].dtype == spec.dtype for name, spec in described[1].inputs.items())


def test_images_are_those_of_onnx_runtime(bundle: Bundle, reference: Bundle) -> None:
    ours, theirs = (Generator(each).generate(PROMPT, seed=3, steps=6)[0] for each in (bundle, reference))
    assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_catalogs_search_and_rerank(bundle: Bundle) -> None:
    shop = products("fashion-woman", 6, seed=0, split="test")
    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add([render(each) for each in shop], [each.caption for each in shop], [each.id for each in shop])
        assert catalog.search(shop[2].caption, limit=1, rerank=3)[0].id == shop[2].id


@needs_bfloat16
def test_bfloat16_is_close(reference: Bundle) -> None:
    bundle = Bundle.open("tiny", threads=1, device="openvino", precision="bf16")
    assert bundle.session("unet").providers == ("openvino:CPU, bf16",)
    images = [render(each) for each in products("fashion-man", 8, seed=0, split="test")]
    ours, theirs = Encoder(bundle).encode_images(images), Encoder(reference).encode_images(images)
    assert (ours * theirs).sum(axis=1).min() > 0.9995
    generated, expected = (Generator(each).generate(PROMPT, seed=3, steps=6)[0] for each in (bundle, reference))
    assert psnr(generated, expected) > 25  # its UNet rounds to three decimal digits
    assert not np.array_equal(np.asarray(generated), np.asarray(expected))


def psnr(a: Image.Image, b: Image.Image) -> float:
    error = np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()
    return float(10 * np.log10(255**2 / error))


def test_sessions_may_be_shared_between_threads(bundle: Bundle) -> None:
    session = bundle.session("text_encoder")
    inputs = [{"input_ids": np.full((1 + k % 3, 32), k + 1, np.int64)} for k in range(24)]
    expected = [session.run(each)["text_embeds"] for each in inputs]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda each: session.run(each)["text_embeds"], inputs * 3))
    for ours, theirs in zip(found, expected * 3, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_outputs_are_copies(bundle: Bundle) -> None:
    session = bundle.session("text_encoder")
    first = session.run({"input_ids": np.ones((1, 32), np.int64)}, ["text_embeds"])
    kept = first["text_embeds"].copy()
    session.run({"input_ids": np.full((1, 32), 7, np.int64)})
    assert list(first) == ["text_embeds"]
    np.testing.assert_array_equal(first["text_embeds"], kept)


def test_wrong_inputs_and_outputs_are_reported(bundle: Bundle) -> None:
    session = bundle.session("text_encoder")
    with pytest.raises(BundleError, match="the graph has no output logits; it has last_hidden_state, text_embeds"):
        session.run({"input_ids": np.ones((1, 32), np.int64)}, ["logits"])
    wrong = {
        "has the inputs input_ids, not ids": {"ids": np.ones((1, 32), np.int64)},
        "has the inputs input_ids, not none": {},
        r"input_ids is int64\[1, 2, 3\]; this graph needs int64\['\?', '\?'\]": {
            "input_ids": np.ones((1, 2, 3), np.int64)
        },
        "input_ids is float32": {"input_ids": np.ones((1, 32), np.float32)},
    }
    for message, feeds in wrong.items():
        with pytest.raises(BundleError, match=message):
            session.run(feeds)
    assert session.run({"input_ids": np.ones((1, 32), np.int64)})["text_embeds"].shape == (1, bundle.dim)


def test_errors_of_the_engine_are_reported() -> None:
    class Request:
        def infer(self, feeds: object) -> None:
            raise RuntimeError("Exception from src/plugins/intel_cpu/graph.cpp:10:\n\nfailed to allocate 3 GB")

    compiled = SimpleNamespace(inputs=[], outputs=[], create_infer_request=Request)
    with pytest.raises(BundleError, match=r"unet: OpenVINO cannot run this graph \(failed to allocate 3 GB\)"):
        OpenVinoSession(compiled, provider="openvino:CPU, f32", name="unet").run({})


def test_damaged_files_are_reported(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"model\.onnx: OpenVINO cannot load this graph on CPU"):
        create_session(file, device="openvino")


@pytest.mark.parametrize("device", ["openvino:", "openvino:TPU", "openvinos", "cpu:0", "OPENVINO", ":openvino"])
def test_unknown_devices_are_refused(reference: Bundle, device: str) -> None:
    with pytest.raises((OptionError, ProviderError), match=r"TPU|device is"):
        Bundle.open("tiny", verify=False, device=device).session("unet")


def test_precisions_are_checked(reference: Bundle) -> None:
    with pytest.raises(OptionError, match="precision is 'fp8'; use one of f32, bf16, f16"):
        Bundle.open("tiny", device="openvino", precision="fp8").session("unet")
    with pytest.raises(OptionError, match="precision='bf16' needs device='openvino'"):
        Bundle.open("tiny", precision="bf16").session("unet")
    with pytest.raises(OptionError, match="is an fp32 bundle; export another with --int8"):
        Bundle.open("tiny", device="openvino", precision="int8")


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    """OpenVINO itself would compute in another precision without a word."""

    class Core:
        available_devices = ("CPU",)

        def get_property(self, device: str, name: str) -> Any:
            return ["FP32", "INT8"]

    with pytest.raises(ProviderError, match="CPU does not compute in bf16; use precision='f32'"):
        create_openvino_session(
            Path("model.onnx"), device="openvino", threads=1, profile=None, half=False, fingerprint="", capture=False,
            precision="bf16", openvino=SimpleNamespace(Core=Core),
        )  # fmt: skip


def test_bundles_for_gpus_are_refused(reference: Bundle) -> None:
    manifest = replace(reference.manifest, target="cuda", devices=("cuda", "cpu"))
    with pytest.raises(BundleError, match="was exported for cuda; OpenVINO runs bundles for CPUs"):
        Bundle(reference.path, manifest, device="openvino")


INTERRUPTED = """
import faulthandler, gc, signal
faulthandler.enable()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background passes SIGINT on as ignored
from unidiff_sdk import Bundle
bundles = [Bundle.open("tiny", device="openvino", verify=False) for _ in range(3)]
for bundle in bundles:
    bundle.session("text_encoder")
del bundle
while bundles:
    del bundles[0]
    gc.collect()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_signals_arrive_after_sessions_were_closed() -> None:
    """OpenVINO frees the signal stack of the thread with each core, which ended the process at the next Ctrl-C."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr
