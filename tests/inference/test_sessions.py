from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.toy_bundle import make_toy_bundle

from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import TensorSpec
from unidiff_sdk.inference.sessions import Session, create_session


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy"), threads=1)


def test_session_describes_its_graph(toy: Bundle) -> None:
    session = create_session(toy.path / "text_encoder" / "model.onnx", threads=1)
    assert session.providers == ("CPUExecutionProvider",) and not session.captured
    assert session.inputs == {"input_ids": TensorSpec("int64", ("batch", "tokens"))}
    assert session.outputs == {
        "last_hidden_state": TensorSpec("float32", ("batch", "tokens", 8)),
        "text_embeds": TensorSpec("float32", ("batch", 8)),
    }


def test_session_returns_outputs_by_name(toy: Bundle) -> None:
    session = create_session(toy.path / "text_encoder" / "model.onnx", threads=1)
    feeds = {"input_ids": np.ones((2, 12), np.int64)}
    everything = session.run(feeds)
    assert {name: array.shape for name, array in everything.items()} == {
        "last_hidden_state": (2, 12, 8),
        "text_embeds": (2, 8),
    }
    (name, array), *rest = session.run(feeds, ["text_embeds"]).items()
    assert name == "text_embeds" and not rest
    np.testing.assert_array_equal(array, everything["text_embeds"])
    with pytest.raises(BundleError, match="the graph has no output logits; it has last_hidden_state, text_embeds"):
        session.run(feeds, ["logits"])


def test_options_are_checked(toy: Bundle) -> None:
    file = toy.path / "unet" / "model.onnx"
    with pytest.raises(OptionError, match="device is 'tpu'; use one of cpu, cuda, tensorrt, openvino"):
        create_session(file, device="tpu")
    with pytest.raises(OptionError, match="threads is 0"):
        create_session(file, threads=0)
    for options in ({"device": "cpu", "profile": toy.profile("unet")}, {"device": "cuda"}):
        with pytest.raises(OptionError, match="capture=True needs device='cuda'"):
            create_session(file, capture=True, **options)


def test_warmup_calls_every_graph_and_reports(toy: Bundle) -> None:
    bundle, lines = Bundle.open(toy.path, threads=1), []
    report = bundle.warmup(lines.append)
    assert [warmup.graph for warmup in report] == list(bundle.manifest.graphs)
    assert lines == [f"loading {graph}" for graph in bundle.manifest.graphs]
    for warmup in report:
        assert warmup.providers == ("CPUExecutionProvider",)
        assert min(warmup.load_seconds, warmup.first_seconds, warmup.next_seconds) > 0
        assert warmup.engines_built == 0 and not warmup.captured
        assert bundle.session(warmup.graph) is bundle.session(warmup.graph)


def test_warmup_counts_the_engines_that_were_built(
    toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sessions that leave a file as TensorRT does; building an engine needs a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = tmp_path / "unidiff-sdk" / "tensorrt" / "versions" / "bundle-unet" / "unet.engine"

    def create(file: Path, **options: Any) -> Session:
        if file.parent.name == "unet":
            engine.parent.mkdir(parents=True, exist_ok=True)
            engine.touch()
        return create_session(file, threads=1)

    bundle, lines = Bundle(toy.path, toy.manifest, device="tensorrt", session_factory=create), []
    assert {warmup.graph: warmup.engines_built for warmup in bundle.warmup(lines.append)}["unet"] == 1
    assert {warmup.engines_built for warmup in bundle.warmup()} == {0}
    assert "loading unet: TensorRT builds or reads its engine, which takes minutes the first time" in lines


def test_warmup_needs_the_shapes(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy", graphs={"unet": {"file": "unet/model.onnx"}})
    with pytest.raises(BundleError, match="does not state the shapes of unet; export it again"):
        Bundle.open(folder).warmup()
