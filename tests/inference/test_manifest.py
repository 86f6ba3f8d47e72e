"""Reading and writing manifest.json: the file on disk stays the same, and an error names the field."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.bundle import TINY
from unidiff_sdk.inference.manifest import MANIFEST, Manifest, TensorSpec, manifest_checksum, read_json

IMAGE = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


def content_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    return content


def test_manifest_of_the_builtin_bundle_is_written_as_it_was_read() -> None:
    manifest = Manifest.read(TINY)
    assert json.dumps(manifest.to_json(), indent=2, ensure_ascii=False) + "\n" == (TINY / MANIFEST).read_text()
    assert (manifest.sampler.steps, manifest.latent.size, manifest.prompt_tokens) == (12, 16, 32)
    assert manifest.graphs["unet"].inputs["sample"] == TensorSpec("float32", ("batch", 4, "height", "width"))
    with pytest.raises(FrozenInstanceError):
        manifest.name = "other"  # type: ignore[misc]


def test_unknown_entries_are_kept(toy: Path) -> None:
    content = content_of(toy)
    del content["checksum"]
    content["measured"] = {"on": ["a", {"b": 1.5}]}
    content["graphs"]["unet"]["kernels"] = 7
    content["checksum"] = manifest_checksum(content)
    written = Manifest.from_json(content, toy / MANIFEST).to_json()
    assert written["measured"] == content["measured"] and written["graphs"]["unet"]["kernels"] == 7
    assert Manifest.from_json(written, toy / MANIFEST).to_json() == written


def test_manifest_without_optional_fields_is_read(toy: Path) -> None:
    content = content_of(toy)
    for name in ("checksum", "target", "synthetic"):
        del content[name]
    content["graphs"] = {"unet": {"file": "unet/model.onnx"}}
    content["embedding"] = {"dim": 8, "max_tokens": 12}
    content["checksum"] = manifest_checksum(content)
    manifest = Manifest.from_json(content, toy / MANIFEST)
    assert manifest.devices is manifest.target is manifest.graphs["unet"].profile is None
    assert not manifest.synthetic and manifest.image and manifest.image.fit == "crop"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "zip", "format is 'zip', not 'unidiff-bundle'; this is not a bundle"),
        ("schema_version", 2, "schema_version is 2, but this version of unidiff-sdk reads 1; upgrade unidiff-sdk"),
        ("schema_version", None, "schema_version is None, .*; export the bundle again"),
        ("schema_version", True, "schema_version is True, .*; export the bundle again"),
        ("name", 3, "name is 3; it must be a text"),
        ("synthetic", 1, "synthetic is 1; it must be true or false"),
        ("devices", "cpu", "devices is 'cpu'; it must be a list, each of it a text"),
        ("graphs", None, "graphs is None; it must be a JSON object"),
        ("graphs.unet", [], r"graphs\.unet is \[\]; it must be a JSON object"),
        ("graphs.unet.file", "other.onnx", r"graphs\.unet\.file is 'other\.onnx'; it must be one of the files"),
        (
            "graphs.unet.inputs.sample.shape",
            [1.5],
            r"sample\.shape\[0\] is 1\.5; it must be an integer or a text",
        ),
        (
            "graphs.unet.profile",
            {"sample": {"min": [True]}},
            r"profile\.sample\.min\[0\] is True",
        ),
        ("graphs.unet.inputs.sample.dtype", "x", r"graphs\.unet gives 'sample' the dtype 'x'; use one of float16"),
        ("graphs.unet.profile", {}, r"graphs\.unet\.profile names , which are not the inputs"),
        (
            "graphs.text_encoder.profile",
            {"input_ids": {"min": [1, 1]}},
            r"input_ids is .*; it must be min, opt",
        ),
        (
            "graphs.text_encoder.profile",
            {"input_ids": {"min": [1, 1], "opt": [60000, 60000], "max": [60000, 60000]}},
            "opt at most 268,435,456 elements",
        ),
        ("image.size", 65_536, r"image\.size is 65536; it must be an integer from 1 to 4,096"),
        ("image.std", [1, 1, 1e-300], r"image\.std\[2\] is 1e-300; it must be a number from 1e-06"),
        ("embedding", 3, "embedding is 3; it must be a JSON object"),
        ("embedding", None, "embedding is missing; it must be a JSON object"),
        ("embedding.dim", ..., r"embedding\.dim is missing; it must be an integer from 1 to 65,536"),
        ("embedding.dim", "8", r"embedding\.dim is '8'; it must be an integer from 1 to 65,536"),
        ("embedding.dim", True, r"embedding\.dim is True; it must be an integer from 1 to 65,536"),
        ("embedding.dim", -8, r"embedding\.dim is -8; it must be an integer from 1 to 65,536"),
        ("embedding.logit_scale", 0, r"embedding\.logit_scale is 0; it must be a number from 1e-06 to 1e\+06"),
        ("image.mean", [0, 0], r"image\.mean is \[0, 0\]; it must be a list of 3, each of it a number from"),
        ("image.std", [1, 1, float("inf")], r"image\.std\[2\] is inf; it must be a number"),
        ("image.fit", "squash", r"image\.fit is 'squash'; it must be crop or pad"),
        ("image.resize", {"side": 0}, r"image\.resize\.side is 0; it must be an integer from 1 to 4,096"),
        (
            "image.resize",
            {"side": 9, "interpolation": "best"},
            "interpolation is .best.; it must be nearest or",
        ),
        ("image", IMAGE | {"fit": "pad", "resize": {"side": 9}}, "fit is 'pad'; with image.resize it must be crop"),
        ("latent.scale_factor", 4.0, r"latent\.scale_factor is 4\.0; it must be an integer from 1 to 65,536"),
        ("latent.shift_factor", None, r"latent\.shift_factor is None; it must be a number"),
        ("sampler.guidance_scale", "3", r"sampler\.guidance_scale is '3'; it must be a number from 1e-06"),
        ("files", {"../secret": "0"}, r"files names '\.\./secret', which lies outside the bundle"),
        ("fingerprint", "0" * 64, "the fingerprint does not match the list of files"),
    ],
)
def test_invalid_field_is_named_with_its_value(tmp_path: Path, toy: Path, path: str, value: Any, message: str) -> None:
    content = content_of(toy)
    del content["checksum"]
    *sections, name = path.split(".")
    section = content
    for each in sections:
        section = section[each]
    if value is ...:
        del section[name]
    else:
        section[name] = value
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=message):
        Manifest.read(tmp_path)


def test_change_after_the_export_is_found(tmp_path: Path, toy: Path) -> None:
    content = content_of(toy)
    content["sampler"]["steps"] = 5
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="was changed after the export"):
        Manifest.read(tmp_path)
    seal(tmp_path, content)
    with pytest.raises(BundleError, match="it must be one of the files"):  # this folder has none
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested more than 100"),
        (b'{"name": ' + b"9" * 5000 + b"}", "5,000 digits"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"a": "\x00"}', "Invalid control character"),
        (b"[]", "must hold a JSON object"),
    ],
)
def test_json_beyond_the_limits_is_a_bundle_error(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=reason):
        read_json(tmp_path / MANIFEST)


def test_sizes_have_an_upper_bound(tmp_path: Path, toy: Path) -> None:
    content = content_of(toy)
    del content["checksum"]
    content["embedding"]["max_tokens"] = 10**9
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match="max_tokens is 1000000000; it must be an integer from 1 to 65,536"):
        Manifest.read(tmp_path)
