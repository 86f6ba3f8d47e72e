"""A bundle folder appears complete or not at all, and never replaces anything but a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxscript", reason="needs the export extra")

import onnx
import onnx_ir as ir

from unidiff_export.bundle.files import hash_files, new_folder, without_origin, write_graph, write_json
from unidiff_sdk.errors import ExportError
from unidiff_sdk.inference.sessions import create_session


def write_bundle(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)


def test_large_weights_become_external_data(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 32), dtype=np.float32)
    product = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    x, y = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, size])
        for name, size in (("x", 64), ("y", 32))
    )
    graph = onnx.helper.make_graph([product], "product", [x], [y], [onnx.numpy_helper.from_array(weight, "weight")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    feed = np.random.default_rng(1).standard_normal((2, 64), dtype=np.float32)
    for name, largest in (("single", 1 << 30), ("external", 0)):
        write_graph(ir.from_proto(model), tmp_path / name, {}, largest_single_file=largest)
        got = create_session(tmp_path / name / "model.onnx").run({"x": feed})
        np.testing.assert_allclose(got["y"], feed @ weight, atol=1e-5)
    assert not (tmp_path / "single" / "model.onnx_data").exists()
    assert (tmp_path / "external" / "model.onnx_data").stat().st_size >= weight.nbytes
    assert (tmp_path / "external" / "model.onnx").stat().st_size < weight.nbytes


def test_new_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "bundle"
    with new_folder(out, overwrite=False) as folder:
        write_bundle(folder, "new")
        assert not out.exists()
    assert (out / "manifest.json").read_text() == "new"
    assert [path.name for path in out.parent.iterdir()] == ["bundle"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ExportError])
def test_new_folder_leaves_nothing_after_an_exception(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), new_folder(tmp_path / "bundle", overwrite=False) as folder:
        write_bundle(folder, "half written")
        raise interruption
    assert not list(tmp_path.iterdir())


def test_bundle_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with (
        pytest.raises(ExportError, match="already exists"),
        new_folder(out, overwrite=False) as folder,
    ):
        write_bundle(folder, "new")
        out.mkdir()
        write_bundle(out, "of another export")
    assert (out / "manifest.json").read_text() == "of another export"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_overwriting_replaces_the_whole_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    write_bundle(out, "old")
    (out / "stale.onnx").touch()
    with new_folder(out, overwrite=True) as folder:
        write_bundle(folder, "new")
        assert (out / "manifest.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert [path.name for path in out.iterdir()] == ["manifest.json"]
    assert (out / "manifest.json").read_text() == "new"


def test_failed_overwriting_keeps_the_old_bundle(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    out.mkdir()
    write_bundle(out, "old")
    with pytest.raises(KeyboardInterrupt), new_folder(out, overwrite=True):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (out / "manifest.json").read_text() == "old"


def test_existing_bundle_is_refused_without_overwrite(tmp_path: Path) -> None:
    write_bundle(tmp_path, "old")
    with pytest.raises(ExportError, match=r"already exists\..* --overwrite"), new_folder(tmp_path, overwrite=False):
        pass


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_only_bundles_are_overwritten(tmp_path: Path, kind: str) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    (other / "manifest.json" if kind == "link" else other / "precious.txt").write_text("precious")
    if kind == "link":
        out.symlink_to(other)
    elif kind == "folder":
        other.rename(out)
    else:
        out.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ExportError, match="is not a bundle"), new_folder(out, overwrite=True):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_hashes_cover_every_file_except_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "model.onnx").write_bytes(b"graph")
    write_bundle(tmp_path, "{}")
    before = hash_files(tmp_path)
    assert list(before) == ["unet/model.onnx"]
    (tmp_path / "unet" / "model.onnx").write_bytes(b"Graph")
    assert hash_files(tmp_path) != before


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "x.json", {"error": float("nan")})


def test_configs_drop_their_source_folder() -> None:
    assert without_origin({"_name_or_path": "/home/me/model", "sample_size": 16}) == {"sample_size": 16}
