"""Bundles on the hub: uploaded, downloaded by name, and opened again without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.loopback_hub import LoopbackHub, loopback_hub
from support.toy_bundle import make_search_bundle

from unidiff_sdk import Bundle
from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.folder.hub import cached_name, download_bundle, upload_bundle

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_search_bundle(tmp_path_factory.mktemp("bundle") / "shop")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Shop\n", encoding="utf-8")
    (folder / "notes.txt").write_text("not part of the bundle")
    return folder


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        yield hub


def run(code: str, hub: LoopbackHub, home: Path, **variables: str) -> dict[str, Any]:
    """Run code in a process with a cache of its own. The hub's client reads its settings when it is imported."""
    names = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in names if name in os.environ} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **variables,
    }
    script = f"import json\nfrom unidiff_sdk import Bundle, Catalog\nresult = {{}}\n{code}\nprint(json.dumps(result))"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


OPEN = """
bundle = Bundle.open(NAME)
result |= {"fingerprint": bundle.fingerprint, "path": str(bundle.path), "verified": bundle.verified}
"""


def test_bundle_is_uploaded_downloaded_and_cached(folder: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    home, catalog = tmp_path / "home", tmp_path / "shop.catalog"
    code = f"""
result["name"] = Bundle.open({str(folder)!r}).push_to_hub("shop/search", token="hf_secret")
NAME = "hf:shop/search"{OPEN}
with Catalog({str(catalog)!r}, bundle="hf:shop/search") as catalog:
    result["info"] = catalog.info()["bundle"]
"""
    result = run(code, hub, home)
    ((sha, files),) = hub.commits["shop/search"].items()
    assert result["name"] == f"hf:shop/search@{sha}" and hub.private == {"shop/search": True}
    listed = Bundle.open(folder).manifest.files
    assert files.keys() == {*listed, "manifest.json", "README.md"}  # not the file that is no part of the bundle
    assert result["fingerprint"] == Bundle.open(folder).fingerprint == result["info"]["fingerprint"]
    assert result["verified"] and Path(result["path"]).is_relative_to(home)
    assert cached_name(Path(result["path"])) == f"hf:shop/search@{sha}"

    # A newer commit is opened by the name, the old one by its revision. A file of neither is not downloaded.
    newer = make_search_bundle(tmp_path / "newer", seed=1)
    contents = {path.relative_to(newer).as_posix(): path.read_bytes() for path in newer.rglob("*") if path.is_file()}
    hub.commit("shop/search", contents | {"pytorch_model.bin": b"a pickle"})
    code = f"NAME = 'hf:shop/search'{OPEN}result['old'] = Bundle.open('hf:shop/search@{sha}').fingerprint"
    result = run(code, hub, home)
    assert result["fingerprint"] == Bundle.open(newer).fingerprint
    assert result["old"] == Bundle.open(folder).fingerprint
    assert not (Path(result["path"]) / "pytorch_model.bin").exists()
    asked = len(hub.requests)

    # A path is never a name on the hub: one may come from a stranger's file.
    with pytest.raises(BundleError, match="there is no such folder"):
        Bundle.open(Path("hf:shop/search"))

    # Offline, and with the catalog's own reference, nothing is asked.
    code = f"""
NAME = "hf:shop/search"{OPEN}
with Catalog({str(catalog)!r}) as opened:
    result["old"] = opened.bundle.fingerprint
"""
    offline = run(code, hub, home, HF_HUB_OFFLINE="1")
    assert offline == result and len(hub.requests) == asked


def test_errors_say_what_to_do(folder: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    hub.commit("some/clip", {"config.json": b"{}", "model.safetensors": b""})
    contents = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.commit("damaged/bundle", contents | {"image_encoder/model.onnx": b"damaged"})
    code = """
for name in ("hf:some/clip", "hf:no/model", "hf:damaged/bundle"):
    try:
        Bundle.open(name)
    except Exception as error:
        result[name] = f"{type(error).__name__}: {error}"
"""
    errors = run(code, hub, tmp_path / "home")
    assert "is not a bundle: it has no manifest.json" in errors["hf:some/clip"]
    assert "unidiff-export --clip hf:some/clip -o BUNDLE" in errors["hf:some/clip"]
    assert errors["hf:no/model"].startswith("BundleError: The hub did not provide hf:no/model: ")
    assert "model.onnx" in errors["hf:damaged/bundle"] and errors["hf:damaged/bundle"].startswith("BundleError")


def test_catalog_names_the_hub_if_the_cache_is_gone(folder: Path, tmp_path: Path) -> None:
    from unidiff_sdk import Catalog

    cache = tmp_path / "hub" / "models--shop--search" / "snapshots" / COMMIT
    shutil.copytree(folder, cache)
    with Catalog(tmp_path / "shop" / "shop.catalog", bundle=cache):
        pass
    shutil.rmtree(tmp_path / "hub")
    with (
        Catalog(tmp_path / "shop" / "shop.catalog") as catalog,
        pytest.raises(BundleError, match=f"bundle=hf:shop/search@{COMMIT}"),
    ):
        catalog.search("red")


@pytest.mark.parametrize("name", ["hf:", "hf:model", "hf:org/", "hf:org/name@", "hf:../etc/passwd", "hf:org/name/part"])
def test_names_of_another_form_are_refused(name: str) -> None:
    with pytest.raises(BundleError, match=r"is not the name of a model on the hub\. Write hf:org/name"):
        download_bundle(name)


def test_upload_needs_a_repository_and_an_unchanged_bundle(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="names a revision"):
        upload_bundle(folder, [], "org/name@main", private=True, token=None)
    bundle = Bundle.open(shutil.copytree(folder, tmp_path / "copy"))
    (bundle.path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(BundleError, match="changed"):
        bundle.push_to_hub("org/name")


@pytest.mark.slow
def test_clip_on_the_hub_is_loaded_for_an_export(random_checkpoint: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """Of several copies of the weights, one is downloaded; pickles never are."""
    contents = {path.name: path.read_bytes() for path in (random_checkpoint / "clip").iterdir()}
    other = {"pytorch_model.bin": b"a pickle", "model.fp16.safetensors": b"a variant", "onnx/model.onnx": b""}
    hub.commit("some/clip", contents | other)
    code = """
from unidiff_sdk.training.checkpoints.encoders.search_model import load_search_model
model = load_search_model("hf:some/clip")
result |= {"name": model.name, "base": model.meta["base_model"], "files": sorted(p.name for p in model.path.iterdir())}
"""
    result = run(code, hub, tmp_path / "home")
    assert result["name"] == "some/clip" and result["base"] == ["some/clip"]
    assert result["files"] == sorted(contents)
    assert run(code, hub, tmp_path / "home", HF_HUB_OFFLINE="1") == result
