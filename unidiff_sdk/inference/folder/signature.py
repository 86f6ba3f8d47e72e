"""Signatures: who exported a bundle. Hashes only show that its files are those of the manifest.

`manifest.sig` holds an Ed25519 signature (RFC 8032) of the bytes of `manifest.json`, which lists the hashes of all
other files. Needs the extra `sign`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unidiff_sdk._internal.files import read_regular_file, write_atomically
from unidiff_sdk._internal.json_values import MAX_DOCUMENT, read_json
from unidiff_sdk.errors import BundleError, OptionError
from unidiff_sdk.inference.manifest import MANIFEST, Manifest

from .files import BundleFiles

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["SIGNATURE", "KeyFile", "check_signature", "read_private_key", "sign_bundle", "sign_manifest"]

SIGNATURE = "manifest.sig"
FORMAT, SCHEMA_VERSION, ALGORITHM = "unidiff-signature", 1, "ed25519"
MAX_SIZE = 1 << 16
"""Bytes of a key or a signature file; both have less than 1,000."""

KeyFile = str | PathLike[str]

GENERATE = "openssl genpkey -algorithm ed25519 -out KEY.pem"
PUBLISH = "openssl pkey -in KEY.pem -pubout -out KEY.pub.pem"


def sign_bundle(folder: str | PathLike[str], key: KeyFile) -> str:
    """Sign an existing bundle, after its files have been compared with its manifest.

    Args:
        folder: the bundle. Its `manifest.sig` is written or replaced.
        key: a PEM file with an Ed25519 private key, not encrypted.

    Returns:
        the id of the key.

    Raises:
        BundleError: the bundle is damaged.
        OptionError: the key cannot be used.
    """
    private = read_private_key(key)
    folder = Path(folder)
    content = _read_manifest(folder)
    manifest = Manifest.parse(content, folder / MANIFEST)
    BundleFiles(folder, manifest.files, verify=True).check()
    return _write_signature(folder, content, private)


def sign_manifest(folder: Path, key: Ed25519PrivateKey) -> str:
    """Sign the manifest in a folder that was just written. Returns the id of the key."""
    return _write_signature(folder, _read_manifest(folder), key)


def check_signature(folder: Path, manifest: bytes, trusted_keys: Sequence[KeyFile]) -> None:
    """Check that one of the trusted keys signed a manifest.

    Args:
        folder: the bundle, which holds the signature.
        manifest: the bytes of its manifest that are used.
        trusted_keys: PEM files with Ed25519 public keys.

    Raises:
        BundleError: there is no valid signature of a trusted key.
        OptionError: a key cannot be read, or none is given.
    """
    keys = _read_public_keys(trusted_keys)
    file = folder / SIGNATURE
    if not file.is_file():
        raise BundleError(
            f"{folder}: has no {SIGNATURE}, so it is not signed by a trusted key ({', '.join(keys)}). Sign it: "
            "unidiff-export sign BUNDLE --key KEY.pem"
        )
    key_id, signature = _read_signature(file)
    if key_id not in keys:
        raise BundleError(
            f"{file}: was signed with the key {key_id}, which is not trusted (trusted: {', '.join(keys)}). Get the "
            "bundle of a trusted key, or trust this key if you know its owner."
        )
    from cryptography.exceptions import InvalidSignature

    try:
        keys[key_id].verify(signature, manifest)
    except InvalidSignature:
        raise BundleError(
            f"{file}: is not a signature of {MANIFEST} by the key {key_id}: one of the files was changed after it was "
            "signed. Get the bundle again from its source."
        ) from None


def read_private_key(file: KeyFile) -> Ed25519PrivateKey:
    """An Ed25519 private key from a PEM file. Raises OptionError."""
    serialization, ed25519 = _cryptography()
    content = _read_key_file(file)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError:
        raise OptionError(f"the key {file} is encrypted; decrypt it: openssl pkey -in {file} -out KEY.pem") from None
    except Exception as error:  # ValueError, and those of unsupported algorithms
        raise OptionError(f"the key {file} is not a private key in PEM ({error}); make one: {GENERATE}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise OptionError(f"the key {file} is not an Ed25519 key; make one: {GENERATE}")
    private: Ed25519PrivateKey = key
    return private


def _read_public_keys(files: Sequence[KeyFile]) -> dict[str, Ed25519PublicKey]:
    """Public keys by their id."""
    if isinstance(files, (str, bytes, PathLike)) or not files:
        raise OptionError(f"trusted_keys is {files!r:.80}; give a list with at least one PEM file of a public key")
    serialization, ed25519 = _cryptography()
    keys = {}
    for file in files:
        content = _read_key_file(file)
        try:
            key = serialization.load_pem_public_key(content)
        except Exception as error:  # ValueError, and those of unsupported algorithms
            hint = f"; extract it: {PUBLISH}" if b"PRIVATE" in content else ""
            raise OptionError(f"the trusted key {file} is not a public key in PEM ({error}){hint}") from None
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise OptionError(f"the trusted key {file} is not an Ed25519 key")
        keys[_key_id(key)] = key
    return keys


def _read_key_file(file: KeyFile) -> bytes:
    if not isinstance(file, (str, PathLike)):
        raise OptionError(f"a key is {file!r:.80}; give the path of a PEM file")
    return read_regular_file(Path(os.fspath(file)), MAX_SIZE, OptionError)


def _key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _read_manifest(folder: Path) -> bytes:
    return read_regular_file(folder / MANIFEST, MAX_DOCUMENT, BundleError)


def _read_signature(file: Path) -> tuple[str, bytes]:
    """The key id and the signature in a signature file. Raises BundleError."""
    content = read_json(file, error=BundleError, max_size=MAX_SIZE)
    expected = {"format": FORMAT, "schema_version": SCHEMA_VERSION, "algorithm": ALGORITHM}
    for name, value in expected.items():
        if content.get(name) != value:
            raise BundleError(f"{file}: {name} is {content.get(name)!r:.80}, not {value!r}. Sign the bundle again.")
    key_id, signature = content.get("key_id"), content.get("signature")
    try:
        if isinstance(key_id, str) and isinstance(signature, str):
            return key_id, base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        signature = str(signature)
    raise BundleError(
        f"{file}: key_id {key_id!r:.80} or signature {signature!r:.80} is damaged. Sign the bundle again."
    )


def _write_signature(folder: Path, manifest: bytes, key: Ed25519PrivateKey) -> str:
    key_id = _key_id(key.public_key())
    content = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "algorithm": ALGORITHM,
        "key_id": key_id,
        "signature": base64.b64encode(key.sign(manifest)).decode(),
    }
    write_atomically(folder / SIGNATURE, (json.dumps(content, indent=2) + "\n").encode())
    return key_id


def _cryptography() -> tuple[Any, Any]:
    """The modules of the cryptography package. Raises OptionError if it is not installed."""
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as error:
        raise OptionError("Signatures need the package cryptography: pip install 'unidiff-sdk[sign]'") from error
    return serialization, ed25519
