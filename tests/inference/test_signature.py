"""Signed bundles: only the bytes that a trusted key signed are accepted."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.color_bundle import color_image, make_color_bundle
from support.toy_bundle import make_toy_bundle, seal

from unidiff_sdk import Catalog
from unidiff_sdk.errors import BundleError, OptionError, UniDiffError
from unidiff_sdk.inference.bundle import Bundle
from unidiff_sdk.inference.folder.signature import SIGNATURE, check_signature, sign_bundle

pytest.importorskip("cryptography", reason="needs the sign extra")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa


def write_key(folder: Path, name: str, key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pem, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, no_password))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture
def ours(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path, "ours", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def theirs(tmp_path: Path) -> tuple[Path, Path]:
    return write_key(tmp_path, "theirs", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture
def signed(tmp_path: Path, ours: tuple[Path, Path]) -> Path:
    folder = make_toy_bundle(tmp_path / "toy")
    sign_bundle(folder, ours[0])
    return folder


def test_signed_bundle_opens_with_its_key(
    signed: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path], tmp_path: Path
) -> None:
    for keys in ([ours[1]], [theirs[1], ours[1]], [str(ours[1])]):
        assert Bundle.open(signed, trusted_keys=keys).verified
    assert Bundle.open(signed).verified
    with pytest.raises(BundleError, match=r"was signed with the key [0-9a-f]{16}, which is not trusted \(trusted: "):
        Bundle.open(signed, trusted_keys=[theirs[1]])


def test_openssl_verifies_the_signature(signed: Path, ours: tuple[Path, Path], tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    (tmp_path / "raw").write_bytes(base64.b64decode(json.loads((signed / SIGNATURE).read_text())["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", ours[1], "-rawin", "-in", signed / "manifest.json"]
    done = subprocess.run([*command, "-sigfile", tmp_path / "raw"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def remove_signature(folder: Path) -> None:
    (folder / SIGNATURE).unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "image_encoder")
    (folder / "model_index.json").write_text("{}")


def change_weights_and_hashes(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text('{"block_out_channels": [4]}')
    seal(folder, {k: v for k, v in json.loads((folder / "manifest.json").read_text()).items()})


def add_a_space(folder: Path) -> None:
    with (folder / "manifest.json").open("a") as manifest:
        manifest.write(" ")


def change_weights(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text('{"block_out_channels": [4]}')


def edit_signature(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / SIGNATURE).read_text()) | values
        (folder / SIGNATURE).write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (remove_signature, r"has no manifest\.sig, so it is not signed by a trusted key"),
        (remove_manifest, r"has no manifest\.json"),
        (change_weights_and_hashes, r"is not a signature of manifest\.json by the key"),
        (add_a_space, r"is not a signature of manifest\.json by the key"),
        (change_weights, "was changed after the export"),
        (edit_signature(signature=""), "is not a signature of"),
        (edit_signature(signature="ä"), "is damaged"),
        (edit_signature(signature=None), "is damaged"),
        (edit_signature(signature="AAAA" * 22), "is not a signature of"),
        (edit_signature(key_id=7), "is damaged"),
        (edit_signature(algorithm="none"), "algorithm is 'none', not 'ed25519'"),
        (edit_signature(schema_version=2), "schema_version is 2, not 1"),
        (lambda folder: (folder / SIGNATURE).write_text("[" * 10_000), "not valid JSON"),
        (lambda folder: (folder / SIGNATURE).write_bytes(bytes(100_000)), "at most 65,536 are allowed"),
    ],
)
def test_unsigned_or_changed_bundle_is_refused(
    signed: Path, ours: tuple[Path, Path], attack: Callable[[Path], object], message: str
) -> None:
    attack(signed)
    with pytest.raises(BundleError, match=message):
        Bundle.open(signed, trusted_keys=[ours[1]])


def test_damaged_bundle_is_not_signed(tmp_path: Path, ours: tuple[Path, Path]) -> None:
    folder = make_toy_bundle(tmp_path / "toy")
    change_weights(folder)
    with pytest.raises(BundleError, match="was changed after the export"):
        sign_bundle(folder, ours[0])
    assert not (folder / SIGNATURE).exists()


def test_keys_that_cannot_be_used_are_named(signed: Path, tmp_path: Path, ours: tuple[Path, Path]) -> None:
    rsa_private, rsa_public = write_key(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    encrypted = tmp_path / "encrypted.pem"
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    key = ed25519.Ed25519PrivateKey.generate()
    encrypted.write_bytes(key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret")))
    (tmp_path / "no.pem").write_bytes(b"no key")
    for private, message in (
        (rsa_private, "is not an Ed25519 key"),
        (encrypted, "is encrypted; decrypt it"),
        (tmp_path / "no.pem", "is not a private key in PEM"),
        (tmp_path / "nowhere.pem", "there is no such file"),
        (ours[1], "is not a private key in PEM"),
    ):
        with pytest.raises(OptionError, match=message):
            sign_bundle(signed, private)
    for public, message in (
        ([rsa_public], "is not an Ed25519 key"),
        ([ours[0]], r"is not a public key in PEM .*; extract it: openssl pkey"),
        ([tmp_path / "no.pem"], "is not a public key in PEM"),
        ([], "at least one PEM file"),
        (str(ours[1]), "give a list"),
        ([7], "give the path of a PEM file"),
    ):
        with pytest.raises(OptionError, match=message):
            Bundle.open(signed, trusted_keys=public)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="cannot be combined with trusted_keys"):
        Bundle.open(signed, verify=False, trusted_keys=[ours[1]])


def test_any_changed_byte_is_found(signed: Path, ours: tuple[Path, Path]) -> None:
    manifest = (signed / "manifest.json").read_bytes()
    signature = (signed / SIGNATURE).read_bytes()
    for position in range(0, len(manifest), 97):
        changed = manifest[:position] + bytes([manifest[position] ^ 1]) + manifest[position + 1 :]
        with pytest.raises(BundleError, match="is not a signature of"):
            check_signature(signed, changed, [ours[1]])
    for position in range(len(signature)):
        (signed / SIGNATURE).write_bytes(
            signature[:position] + bytes([signature[position] ^ 1]) + signature[position + 1 :]
        )
        try:
            check_signature(signed, manifest, [ours[1]])
        except UniDiffError:
            continue
        # Only white space between the values, and case or padding that means the same, may change.
        assert json.loads((signed / SIGNATURE).read_text()) == json.loads(signature)


def test_catalog_opens_only_signed_bundles(tmp_path: Path, ours: tuple[Path, Path], theirs: tuple[Path, Path]) -> None:
    folder, place = make_color_bundle(tmp_path / "bundle"), tmp_path / "shop.catalog"
    trusted = {"trusted_keys": [ours[1]]}
    with pytest.raises(BundleError, match="is not signed by a trusted key"):
        Catalog(place, folder, **trusted)  # type: ignore[arg-type]
    sign_bundle(folder, ours[0])
    with Catalog(place, folder, **trusted) as catalog:  # type: ignore[arg-type]
        catalog.add([color_image("red")], ids=["red"])
        catalog.export(tmp_path / "shop.parquet")
        with pytest.raises(BundleError, match="is not signed by a trusted key"):
            catalog.reindex(make_color_bundle(tmp_path / "other", variant=1))
        with pytest.raises(BundleError, match="is not signed by a trusted key"):
            catalog.reindex("tiny")
    with Catalog(place, **trusted) as catalog:  # type: ignore[arg-type]
        assert catalog.search("red")[0].id == "red"
    with Catalog(place, trusted_keys=[theirs[1]]) as catalog, pytest.raises(BundleError, match="is not trusted"):
        catalog.search("red")
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "new", **trusted) as catalog:
        assert catalog.search("red")[0].id == "red"
    with pytest.raises(BundleError, match="is not trusted"):
        Catalog.restore(tmp_path / "shop.parquet", tmp_path / "newer", trusted_keys=[theirs[1]])
