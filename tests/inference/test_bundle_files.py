"""Only the listed files of a bundle are used, and only with the content that its manifest states."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk.errors import BundleError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.folder.files import BundleFiles


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "toy")


def unlist(folder: Path, *names: str) -> None:
    """Write a manifest with valid hashes that does not list some files. They stay in the folder."""
    kept = {name: (folder / name).read_bytes() for name in names}
    for name in names:
        (folder / name).unlink()
    seal(folder, json.loads((folder / "manifest.json").read_text()))
    for name, content in kept.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("tokenizer/tokenizer.json", lambda bundle: Encoder(bundle).encode_text("a coat")),
        ("tokenizer/tokenizer_config.json", lambda bundle: Encoder(bundle).encode_text("a coat")),
        ("tokenizer/tokenizer.json", lambda bundle: Generator(bundle).generate("a coat")),
        ("scheduler/scheduler_config.json", lambda bundle: bundle.schedule()),
        ("unet/config.json", lambda bundle: Generator(bundle).generate("a coat")),
        ("vae_decoder/config.json", lambda bundle: Generator(bundle).generate("a coat", width=8, height=8)),
    ],
)
def test_unlisted_file_is_not_used(toy: Path, name: str, use) -> None:  # type: ignore[no-untyped-def]
    unlist(toy, name)
    with pytest.raises(BundleError, match="is not listed in the manifest of the bundle"):
        use(Bundle.open(toy))


def test_unlisted_special_tokens_are_ignored(toy: Path) -> None:
    before = Encoder(Bundle.open(toy)).tokenize(["a"])
    (toy / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": "<|endoftext|>"}')
    assert (Encoder(Bundle.open(toy)).tokenize(["a"]) == before).all()
    seal(toy, json.loads((toy / "manifest.json").read_text()))
    (toy / "tokenizer" / "tokenizer_config.json").write_text("{}")
    seal(toy, json.loads((toy / "manifest.json").read_text()))
    assert (Encoder(Bundle.open(toy)).tokenize(["a"]) != before).any()


def test_file_that_changes_after_opening_is_not_used(toy: Path) -> None:
    bundle = Bundle.open(toy)
    assert bundle.verified and not Bundle.open(toy, verify=False).verified
    os.utime(toy / "vae_decoder" / "model.onnx")  # touched, not changed
    bundle.session("vae_decoder")
    other = make_toy_bundle(toy.parent / "other", seed=1)
    shutil.copy(other / "unet" / "model.onnx", toy / "unet" / "model.onnx")
    (toy / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(BundleError, match=r"unet.model\.onnx: was changed after the export"):
        bundle.session("unet")
    with pytest.raises(BundleError, match=r"scheduler_config\.json: was changed after the export"):
        bundle.schedule()


def test_fingerprint_is_compared_before_other_files_are_read(toy: Path) -> None:
    fingerprint = Bundle.open(toy).fingerprint
    assert Bundle.open(toy, fingerprint=fingerprint).fingerprint == fingerprint
    for file in toy.rglob("*.*"):
        if file.name != "manifest.json":
            file.unlink()
    with pytest.raises(BundleError, match=r"has the fingerprint .*, not 0000"):
        Bundle.open(toy, fingerprint="0" * 64)


def test_bundle_that_lost_its_manifest_is_refused(toy: Path) -> None:
    (toy / "model_index.json").write_text("{}")
    (toy / "manifest.json").unlink()
    for verify in (True, False):
        with pytest.raises(BundleError, match=r"has no manifest\.json, but image_encoder/model\.onnx"):
            Bundle.open(toy, verify=verify)


def test_pipe_in_a_bundle_is_refused_without_waiting(toy: Path) -> None:
    (toy / "unet" / "config.json").unlink()
    os.mkfifo(toy / "unet" / "config.json")
    with pytest.raises(BundleError, match=r"config\.json: the file is missing"):
        Bundle.open(toy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a//b", "./a", "a\\..\\b", "", "a\x00b", "a/../../b"])
def test_listed_names_are_plain_paths(toy: Path, name: str) -> None:
    content = json.loads((toy / "manifest.json").read_text())
    content["files"][name] = "0" * 64
    del content["checksum"]
    (toy / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(BundleError, match="lies outside the bundle or is not a plain path"):
        Bundle.open(toy)


def test_graph_file_has_the_suffix_of_onnx(tmp_path: Path) -> None:
    toy = make_toy_bundle(tmp_path / "toy")
    content = json.loads((toy / "manifest.json").read_text())
    (toy / "unet" / "model.onnx").rename(toy / "unet" / "model.ort")
    content["graphs"]["unet"]["file"] = "unet/model.ort"
    seal(toy, content)
    with pytest.raises(BundleError, match=r"unet/model\.ort'; it must end with \.onnx"):
        Bundle.open(toy)


def test_part_reads_only_its_listed_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("a/x", "a/y"):
        (tmp_path / name).write_text("{}")
    part = BundleFiles(tmp_path, {"a/x": "0" * 64}).part("a")
    assert "x" in part and "y" not in part and part.read("x") == b"{}"
    with pytest.raises(BundleError, match=r"a.x: was changed after the export"):
        BundleFiles(tmp_path, {"a/x": "0" * 64}, verify=True).part("a").read("x")
