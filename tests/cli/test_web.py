"""`unidiff web`: what the site holds, and which catalogs, bundles and folders are refused. `tests/browser` opens it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.cli.main import main
from unidiff_sdk.cli.servers.site import items as site_items
from unidiff_sdk.cli.servers.site import writer
from unidiff_sdk.cli.servers.site.items import quantize_rows
from unidiff_sdk.cli.servers.site.model import float32_json, sampler_tables
from unidiff_sdk.datasets.synthetic import write_catalog
from unidiff_sdk.generation.samplers import make_table
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import Patches

ITEMS = 7


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("web")
    write_catalog("fashion-woman", folder / "products", n=ITEMS, seed=1, split="train")
    with Catalog(folder / "shop.catalog", bundle=Bundle.open("tiny", threads=1)) as opened:
        opened.add_folder(folder / "products")
        opened.add(opened.browse(limit=1)[0].image_bytes(), "<b>bold</b>", 7, {"price": 1.5, "tags": ["a"]})
    return folder / "shop.catalog"


@pytest.fixture(autouse=True)
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the built page, which needs Node.js."""
    page = tmp_path / "page"
    (page / "ort").mkdir(parents=True)
    (page / "index.html").write_text("<!doctype html>")
    (page / "ort" / "wasm.bin").write_bytes(b"wasm")
    monkeypatch.setattr(writer, "PAGE", page)
    return page


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["web", *map(str, arguments)])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_site_holds_the_items_of_the_catalog(catalog: Path, tmp_path: Path) -> None:
    result = run(catalog, "-o", tmp_path / "site")
    assert result.exit_code == 0, result.output
    data = tmp_path / "site" / "data"
    items, index = read(data / "items.json"), read(tmp_path / "site" / "site.json")
    assert (index["items"], index["dim"], index["vectors"], index["name"]) == (ITEMS + 1, 128, "float32", "shop")
    vectors = np.fromfile(data / "vectors.bin", "<f4").reshape(ITEMS + 1, 128)
    with Catalog(catalog) as opened:
        records = {r.payload["id"]: r for batch in opened._store.scroll() for r in batch}
        assert items["ids"] == list(records)
        for k, record in enumerate(records.values()):
            assert np.array_equal(vectors[k], record.vector)
            assert items["texts"][k] == record.payload["text"]
            hit = opened.get(items["ids"][k])
            assert hit is not None and items["columns"][k] == hit.payload
            shard, start, size = items["thumbnails"][k]
            packed = (data / "thumbnails" / f"{shard:03}.bin").read_bytes()[start : start + size]
            assert packed == hit.thumbnail_bytes()
    last = items["ids"].index(7)
    assert items["columns"][last] == {"price": 1.5, "tags": ["a"]} and items["kinds"]["price"] == "number"


def test_the_index_has_the_hash_of_every_file_that_the_page_loads(catalog: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert run(catalog, "-o", site, "--rerank").exit_code == 0
    index = read(site / "site.json")
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files == {*index["files"], *index["shell"], "site.json"}
    for name, entry in index["files"].items():
        content = (site / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert "model/vae_encoder/model.onnx" not in files  # the page does not use it
    rerank = read(site / "data" / "model.json")["rerank"]
    assert (site / "data" / "latents.bin").stat().st_size == (ITEMS + 1) * 4 * 16 * 16 * 2
    assert (site / "data" / "errors.bin").stat().st_size == (ITEMS + 1) * len(rerank["timesteps"]) * 4
    assert np.allclose(np.square(rerank["signal"]) + np.square(rerank["noise"]), 1)


def test_stored_latents_are_those_of_the_site(tmp_path: Path) -> None:
    place, image = tmp_path / "shop.catalog", np.full((8, 8, 3), 200, np.uint8)
    with Catalog(place, bundle=Bundle.open("tiny", threads=1)) as opened:
        opened.add([image, image // 2], ids=[1, 2])
    assert run(place, "-o", tmp_path / "computed", "--rerank").exit_code == 0
    with Catalog(place) as opened:
        opened.prepare_rerank()
    result = run(place, "-o", tmp_path / "stored", "--rerank")
    assert result.exit_code == 0, result.output
    for name in ("latents.bin", "errors.bin"):
        computed, stored = ((tmp_path / site / "data" / name).read_bytes() for site in ("computed", "stored"))
        assert computed == stored


def test_ids_are_written_exactly(tmp_path: Path) -> None:
    ids = [2**53 + 1, 2**53 + 2, -(2**63), 2**53 - 1, 7, "7", str(2**53 + 1)]
    with Catalog(tmp_path / "shop.catalog", bundle=Bundle.open("tiny", threads=1)) as opened:
        opened.add([np.full((8, 8, 3), k, np.uint8) for k in range(len(ids))], ids=ids)
    assert run(tmp_path / "shop.catalog", "-o", tmp_path / "site").exit_code == 0
    written = read(tmp_path / "site" / "data" / "items.json")["ids"]
    assert {(type(id), id) for id in written} == {(type(id), id) for id in ids}


def test_thumbnails_are_packed_in_shards(catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site_items, "SHARD_BYTES", 3000)
    assert run(catalog, "-o", tmp_path / "site").exit_code == 0
    data = tmp_path / "site" / "data"
    items = read(data / "items.json")
    assert len(list((data / "thumbnails").iterdir())) == 1 + max(shard for shard, _, _ in items["thumbnails"]) > 1
    with Catalog(catalog) as opened:
        for id, (shard, start, size) in zip(items["ids"], items["thumbnails"], strict=True):
            hit = opened.get(id)
            content = (data / "thumbnails" / f"{shard:03}.bin").read_bytes()[start : start + size]
            assert hit is not None and content == hit.thumbnail_bytes()


def test_int8_vectors_take_a_quarter(catalog: Path, tmp_path: Path) -> None:
    assert run(catalog, "-o", tmp_path / "site", "--int8-vectors", "--name", "My shop").exit_code == 0
    index, data = read(tmp_path / "site" / "site.json"), tmp_path / "site" / "data"
    assert (index["vectors"], index["name"]) == ("int8", "My shop")
    assert (data / "vectors.bin").stat().st_size == (ITEMS + 1) * 128
    assert (data / "scales.bin").stat().st_size == (ITEMS + 1) * 4


@given(arrays(np.float32, (3, 5), elements=st.floats(-4, 4, width=32)))
def test_int8_rows_are_within_half_a_step(vectors: np.ndarray) -> None:
    codes, scales = quantize_rows(vectors)
    assert np.all(np.abs(codes * scales[:, None] - vectors) <= scales[:, None] / 2 + 1e-6)


@given(arrays(np.float32, 8, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_json_numbers_are_exact_in_float32(values: np.ndarray) -> None:
    assert np.array_equal(np.array(json.loads(json.dumps(float32_json(values))), np.float32), values)


def test_sampler_tables_are_those_of_the_runtime() -> None:
    bundle = Bundle.open("tiny", threads=1)
    tables = sampler_tables(bundle.schedule(), "dpm++2m", 12)
    assert set(tables) == {"ddim", "euler", "euler_karras", "euler_a", "dpm++2m", "dpm++2m_karras"}
    for name, by_steps in tables.items():
        for steps, table in by_steps.items():
            expected = make_table(name, bundle.schedule(), int(steps))
            assert np.array_equal(np.array(table["rows"], np.float32), expected.rows)
            assert table["init_noise_sigma"] == expected.init_noise_sigma
    assert set(sampler_tables(bundle.schedule(), "lcm", 4)["lcm"]) == {"4", "6", "8", "12", "16", "20", "30", "50"}


def test_a_site_is_replaced_only_on_request(catalog: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    assert run(catalog, "-o", site).exit_code == 0
    result = run(catalog, "-o", site)
    assert result.exit_code == 1 and "is an earlier site" in result.output
    assert run(catalog, "-o", site, "--overwrite", "--json").exit_code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    result = run(catalog, "-o", tmp_path / "other", "--overwrite")
    assert result.exit_code == 1 and "exists and is not a site" in result.output
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
    (tmp_path / "other" / "site.json").write_text('{"title": "of another program"}')
    result = run(catalog, "-o", tmp_path / "other", "--overwrite")
    assert result.exit_code == 1 and "exists and is not a site" in result.output
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"


def test_a_page_that_is_not_built_names_the_command(catalog: Path, tmp_path: Path, page: Path) -> None:
    (page / "index.html").unlink()
    result = run(catalog, "-o", tmp_path / "site")
    assert result.exit_code == 1 and "run `make web`" in " ".join(result.output.split())
    assert not (tmp_path / "site").exists()


def test_an_empty_catalog_is_refused(tmp_path: Path) -> None:
    Catalog(tmp_path / "empty.catalog").close()
    result = run(tmp_path / "empty.catalog", "-o", tmp_path / "site")
    assert result.exit_code == 1 and "the catalog is empty" in result.output


def test_a_bundle_that_embeds_differently_is_refused(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run(catalog, "-o", tmp_path / "site", "--bundle", "tiny")
    assert result.exit_code == 0, result.output  # the same model
    made: list[Encoder] = []

    class Other(Encoder):
        """The encoder of the page, and one of the catalog that is another."""

        def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
            made.append(self)
            return np.roll(super().encode_texts(texts), len(made), axis=1)

    monkeypatch.setattr(writer, "Encoder", Other)
    result = run(catalog, "-o", tmp_path / "other", "--bundle", "tiny")
    assert result.exit_code == 2 and "embeds texts differently" in " ".join(result.output.split())


def test_a_bundle_that_no_browser_runs_is_refused(
    catalog: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unidiff_sdk.cli.servers.site import model

    monkeypatch.setattr(model, "UNET_INPUTS", {"sample"})  # as if it had fewer than that of the bundle
    result = run(catalog, "-o", tmp_path / "site")
    assert result.exit_code == 2 and "The page generates with Stable Diffusion 1 and 2" in result.output
    with monkeypatch.context() as patched:
        patched.setattr(model, "UNET_INPUTS", {"sample", "timestep", "encoder_hidden_states"})
        patched.setattr(Bundle, "image_patches", Patches(16, 64, "bilinear"))
        result = run(catalog, "-o", tmp_path / "site")
    assert result.exit_code == 2 and "lists of patches" in " ".join(result.output.split())
    monkeypatch.setattr(model, "TARGETS", ("web",))
    result = run(catalog, "-o", tmp_path / "site")
    assert result.exit_code == 2 and "unidiff-export --target web" in " ".join(result.output.split())
