"""`unidiff-export`: options, the tables of the evidence, and errors in one line."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table
from support.toy_bundle import make_toy_bundle

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")

from unidiff_export import Export, GraphReport
from unidiff_export.cli import graph_table, main, result_table, summary
from unidiff_export.verification import EmbeddingParity, GraphParity, ImageParity, SearchParity
from unidiff_sdk.inference.bundle import Bundle

INT8 = {"layers": 83, "multiply_adds": 0.9804, "float_layers": []}
EXPORT = Export(
    Path("bundles/shop"),
    (GraphReport("unet", "int8", 8, 12_900_000, GraphParity(1.7e-6, 0.9999999, 1e-4, 0.99), INT8),),
    ImageParity(89.0, 45.0, 0.911, 0.912, images=16, steps=12, resolution=64),
    SearchParity(0.9375, 0.95, pairs=200),
    EmbeddingParity(0.99997, 0.99995, 0.9999, texts=6, images=4),
    seconds=31.26,
    bytes=21_217_000,
    peak_bytes=885_400_000,
)


def rendered(table: Table) -> str:
    output = io.StringIO()
    Console(file=output, width=120).print(table)
    return output.getvalue()


def test_tables_show_the_evidence() -> None:
    graphs, results = rendered(graph_table(EXPORT)), rendered(result_table(EXPORT))
    for figure in ("unet", "int8", "98.0%", "12.9", "1.7e-06", "≤ 1e-04"):
        assert figure in graphs
    for figure in (
        "worst of 16 images, 64 px",
        "89.0 dB",
        "≥ 45 dB",
        "0.911",
        "0.912",
        "93.8%",
        "95.0%",
        "200 pairs",
        "0.99995",
    ):
        assert figure in results


def test_summary_ends_with_the_folder() -> None:
    expected = "Exported fp32 bundle (21.2 MB) in 31.3 s, peak memory 885.4 MB: bundles/shop"
    assert summary(EXPORT, "fp32") == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"precision": "fp32", "target": "cpu", "overwrite": False, "calibration": None, "clip": None}),
        (["--fp16", "--target", "cuda", "--overwrite"], {"precision": "fp16", "target": "cuda", "overwrite": True}),
        (["--int8", "--calibration", "products"], {"precision": "int8", "calibration": Path("products")}),
        (["--sign", "KEY.pem"], {"sign": "KEY.pem"}),
    ],
)
def test_options_are_parsed(options: list[str], expected: dict[str, object]) -> None:
    parameters = main.make_context("unidiff-export", ["tiny", "-o", "bundle", *options]).params
    assert expected.items() <= parameters.items()
    assert (parameters["checkpoint"], parameters["out"]) == ("tiny", Path("bundle"))


def test_key_is_checked_before_the_export(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tiny", "-o", str(tmp_path / "out"), "--sign", str(tmp_path / "nowhere.pem")])
    assert result.exit_code == 2 and "nowhere.pem: cannot be read, because there is no such file" in result.stderr
    assert not (tmp_path / "out").exists()


def test_existing_bundle_is_signed(tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="needs the sign extra")
    from cryptography.hazmat.primitives import serialization as serial
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, pem = Ed25519PrivateKey.generate(), serial.Encoding.PEM
    (tmp_path / "key.pem").write_bytes(key.private_bytes(pem, serial.PrivateFormat.PKCS8, serial.NoEncryption()))
    (tmp_path / "key.pub.pem").write_bytes(key.public_key().public_bytes(pem, serial.PublicFormat.SubjectPublicKeyInfo))
    bundle = make_toy_bundle(tmp_path / "toy")
    result = CliRunner().invoke(main, ["sign", str(bundle), "--key", str(tmp_path / "key.pem")])
    assert result.exit_code == 0 and "manifest.sig, signed with the key" in result.stdout, result.stderr
    assert Bundle.open(bundle, trusted_keys=[tmp_path / "key.pub.pem"]).verified


def test_unknown_target_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["tiny", "-o", str(tmp_path / "out"), "--target", "tpu"])
    assert result.exit_code == 2
    assert "'tpu' is not one of 'cpu', 'portable', 'cuda', 'tensorrt'" in result.stderr


def test_missing_checkpoint_is_one_line_and_leaves_no_bundle(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: There is no checkpoint folder")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_missing_part_is_named_in_one_line(random_checkpoint: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(random_checkpoint, tmp_path / "broken")
    (broken / "vae" / "config.json").unlink()
    result = CliRunner().invoke(main, [str(broken), "-o", str(tmp_path / "out")])
    shutil.rmtree(broken / "clip")
    no_clip = CliRunner().invoke(main, [str(broken), "-o", str(tmp_path / "out")])
    assert no_clip.stderr.startswith(f"Error: {broken} has no CLIP")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {broken} is not a complete checkpoint")
    assert "vae/config.json" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
