from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.inference import bundle as bundle_module
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.manifest import Manifest
from unidiff_sdk.inference.sessions import Session, create_session


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], checksum: bool = False) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    if not checksum:
        manifest.pop("checksum", None)
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_open_reads_the_manifest(toy: Path) -> None:
    bundle = Bundle.open(toy)
    assert (bundle.name, bundle.precision, bundle.dim, bundle.image_size, bundle.max_tokens) == (
        "toy",
        "fp32",
        8,
        16,
        12,
    )
    assert bundle.synthetic and len(bundle.fingerprint) == 64 and bundle.path == toy
    assert bundle.image_mean.tolist() == bundle.image_std.tolist() == [0.5, 0.5, 0.5]
    assert bundle.schedule().num_train_timesteps == 1000
    assert "'toy', fp32, 8-dimensional, device='cpu'" in repr(bundle)
    assert bundle.has_graph("unet") and not bundle.has_graph("clip_text_encoder")


def test_graphs_load_once_when_first_used(toy: Path) -> None:
    loaded = []

    def create(file: Path, **options: Any) -> Session:
        loaded.append(file.parent.name)
        return create_session(file, **options)

    bundle = Bundle(toy, Manifest.read(toy), threads=1, session_factory=create)
    assert loaded == []
    with ThreadPoolExecutor(8) as pool:
        sessions = list(pool.map(bundle.session, ["unet"] * 8))
    assert loaded == ["unet"] and len(set(map(id, sessions))) == 1
    with pytest.raises(BundleError, match="there is no graph 'mask'; the bundle holds image_encoder, text_encoder"):
        bundle.session("mask")


class Recorder:
    """Creates sessions, and records which ones and how many at the same time."""

    def __init__(self, refused: str = "") -> None:
        self.refused, self.loaded, self.running, self.most = refused, [], 0, 0
        self.lock, self.two = threading.Lock(), threading.Event()

    def __call__(self, file: Path, **options: Any) -> Session:
        with self.lock:
            self.loaded.append(file.parent.name)
            self.running += 1
            self.most = max(self.most, self.running)
        if self.running > 1:
            self.two.set()
        self.two.wait(0.5)  # gives a second thread the time to start
        try:
            if file.parent.name == self.refused:
                raise BundleError(f"{self.refused} cannot be loaded")
            return create_session(file, **options)
        finally:
            with self.lock:
                self.running -= 1


def test_graphs_that_are_used_together_load_at_the_same_time(toy: Path) -> None:
    create = Recorder()
    bundle = Bundle(toy, Manifest.read(toy), threads=1, session_factory=create)
    bundle.load("unet", "vae_decoder", "text_encoder", "unet")
    assert sorted(create.loaded) == ["text_encoder", "unet", "vae_decoder"] and create.most == 2
    bundle.load("unet", "text_encoder")
    assert len(create.loaded) == 3 and bundle.session("unet") is bundle.session("unet")


def test_large_graphs_load_one_after_the_other(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum((toy / name / "model.onnx").stat().st_size for name in ("unet", "vae_decoder"))
    for limit, most in ((size, 2), (size - 1, 1)):
        monkeypatch.setattr("unidiff_sdk.inference.bundle.LOADED_TOGETHER", limit)
        create = Recorder()
        Bundle(toy, Manifest.read(toy), threads=1, session_factory=create).load("unet", "vae_decoder")
        assert (create.most, create.loaded[0]) == (most, "unet")


def test_a_graph_that_cannot_be_loaded_with_others_is_named(toy: Path) -> None:
    create = Recorder(refused="vae_decoder")
    bundle = Bundle(toy, Manifest.read(toy), threads=1, session_factory=create)
    with pytest.raises(BundleError, match="vae_decoder cannot be loaded"):
        bundle.load("unet", "vae_decoder", "text_encoder")
    create.refused = ""
    bundle.load("unet", "vae_decoder", "text_encoder")
    assert create.loaded.count("unet") == 1 and create.running == 0
    with pytest.raises(BundleError, match="there is no graph 'mask'"):
        bundle.load("unet", "mask")


def test_open_names_a_file_that_was_changed(toy: Path) -> None:
    for file in [file for file in toy.rglob("*") if file.is_file()]:
        original = file.read_bytes()
        changed = bytearray(original)
        changed[len(changed) // 2] ^= 1
        file.write_bytes(changed)
        with pytest.raises(BundleError, match=file.name):
            Bundle.open(toy)
        file.write_bytes(original)
    Bundle.open(toy)


def test_open_finds_a_changed_manifest(toy: Path) -> None:
    edit(toy, lambda manifest: manifest["sampler"].update(steps=5), checksum=True)
    with pytest.raises(BundleError, match=r"manifest.json: was changed after the export"):
        Bundle.open(toy)
    edit(toy, lambda manifest: None)
    with pytest.raises(BundleError, match="checksum is missing, so changes cannot be found"):
        Bundle.open(toy)
    edit(toy, lambda manifest: manifest.update(fingerprint="0" * 64))
    with pytest.raises(BundleError, match="fingerprint does not match"):
        Bundle.open(toy)


def test_open_without_verify_checks_only_presence(toy: Path) -> None:
    (toy / "vae_decoder" / "model.onnx").write_bytes(b"no graph")
    bundle = Bundle.open(toy, verify=False)
    with pytest.raises(BundleError, match=r"vae_decoder.model.onnx: ONNX Runtime cannot load this graph"):
        bundle.session("vae_decoder")
    (toy / "vae_decoder" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"vae_decoder.model.onnx: the file is missing"):
        Bundle.open(toy, verify=False)


def test_fingerprint_depends_on_the_weights_not_the_name(tmp_path: Path) -> None:
    first = Bundle.open(make_toy_bundle(tmp_path / "a"))
    renamed = Bundle.open(make_toy_bundle(tmp_path / "b", name="other"))
    trained = Bundle.open(make_toy_bundle(tmp_path / "c", seed=1))
    assert first.fingerprint == renamed.fingerprint != trained.fingerprint


def test_open_refuses_files_outside_the_folder(toy: Path) -> None:
    for name in ("../secret", "/etc/hostname"):
        edit(toy, lambda manifest, name=name: manifest["files"].update({name: "0"}))
        with pytest.raises(BundleError, match="lies outside the bundle"):
            Bundle.open(toy)


def test_open_explains_why_a_folder_is_not_a_bundle(tmp_path: Path, toy: Path) -> None:
    with pytest.raises(BundleError, match="there is no such folder"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=r"has no manifest.json"):
        Bundle.open(tmp_path)
    (tmp_path / "unidiff.json").write_text("{}")
    with pytest.raises(BundleError, match="It is a training checkpoint, for: unidiff-export"):
        Bundle.open(tmp_path)
    for text in ("{", "[]"):
        (toy / "manifest.json").write_text(text)
        with pytest.raises(BundleError, match=r"manifest.json: (cannot be read as JSON|must hold a JSON object)"):
            Bundle.open(toy)


def test_open_checks_the_device(toy: Path) -> None:
    with pytest.raises(OptionError, match="device is 'gpu'; use one of cpu, cuda, tensorrt"):
        Bundle.open(toy, device="gpu")


def test_open_reports_a_missing_builtin_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "TINY", tmp_path / "tiny")
    for path in (None, "tiny"):
        with pytest.raises(BundleError, match="default bundle is missing from this installation"):
            Bundle.open(path)
    shutil.copytree(make_toy_bundle(tmp_path / "toy"), tmp_path / "tiny")
    assert Bundle.open().name == "toy"


def test_unsupported_schedule_is_reported_when_used(toy: Path) -> None:
    (toy / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "flow"}')
    seal(toy, json.loads((toy / "manifest.json").read_text()))
    with pytest.raises(BundleError, match="'flow' is not supported"):
        Bundle.open(toy).schedule()


def test_bundle_for_other_devices_is_refused(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "toy", devices=["cpu", "cuda"])
    Bundle.open(folder, device="cuda")
    with pytest.raises(BundleError, match=r"was exported for cpu, which runs on cpu and cuda; .* --target tensorrt"):
        Bundle.open(folder, device="tensorrt")
