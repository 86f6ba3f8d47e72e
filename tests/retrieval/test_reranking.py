"""Searches with `rerank=`: order, pages, groups, filters, prepared latents, damage and bad input, with a toy bundle."""

from __future__ import annotations

import asyncio
import json
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.recorded import open_recorded, open_watched, recorded
from support.toy_bundle import CHANNELS, INPUTS, LATENT_SIZE, make_toy_bundle

from unidiff_sdk import Bundle, BundleError, Catalog, GenerationError, ImageError, OptionError, StoreError
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.manifest import Manifest, manifest_checksum
from unidiff_sdk.retrieval.options import MAX_RERANKED, SearchOptions
from unidiff_sdk.retrieval.reranking.latents import ImageLatents, LatentCache, LatentStore
from unidiff_sdk.retrieval.reranking.reranker import combined_scores, gains_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The bundle .toy. was trained"),
    pytest.mark.filterwarnings("ignore:rerank= uses general defaults"),
]

TEXT, ITEMS, K = "red boots", 30, 8
GAIN = {"recall_at_1": 0.8, "reranked_recall_at_1": 0.9, "queries": 100, "gallery": 500}
RERANK = {"timesteps": [600, 800], "candidates": 5, "weight": 1.5, "noise_seed": 3, "gain": GAIN}


def images(count: int = ITEMS, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in pixels]


def fill(catalog: Catalog) -> None:
    payloads = [{"shelf": k % 10, "even": k % 2 == 0} for k in range(ITEMS)]
    catalog.add(images(), [f"item {k}" for k in range(ITEMS)], list(range(ITEMS)), payloads)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path_factory.mktemp("shop") / "shop.catalog", toy) as catalog:
        fill(catalog)
        yield catalog


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle with its own defaults and a measured gain."""
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle", rerank=RERANK)


def ids(hits: Any) -> list[Any]:
    return [hit.id for hit in hits]


def latent_files(catalog: Catalog) -> list[Path]:
    return sorted(catalog.folder.glob("latents-*/*/*.bin"))


# ---------------------------------------------------------------------------------------------------- the order


def test_rerank_orders_the_best_items_by_both_models(shop: Catalog) -> None:
    """Scores and order equal a plain computation with the sessions of the bundle."""
    found = shop.search(TEXT, limit=ITEMS)
    page = shop.search(TEXT, rerank=K, limit=ITEMS)
    sessions, schedule = shop.bundle.session, shop.bundle.schedule()

    def states(text: str) -> np.ndarray:
        ids = Generator(shop.bundle)._conditioner._tokenize(text)[0][0]
        feeds = {"input_ids": np.array([ids], np.int64)}
        return sessions("text_encoder").run(feeds)["last_hidden_state"]

    def error(hit: Any, text: str) -> float:
        pixels = np.asarray(hit.load_image(), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        z = 0.5 * sessions("vae_encoder").run({"sample": pixels})["latent_sample"]
        z, errors = z.astype(np.float16).astype(np.float32), []
        for t in (600, 800):
            rng = np.random.Generator(np.random.Philox(key=np.array([3, t], np.uint64)))
            noise = rng.standard_normal(z.shape[1:], dtype=np.float32)
            bar = schedule.alphas_cumprod[t]
            feeds = {
                "sample": (bar**0.5 * z + (1 - bar) ** 0.5 * noise).astype(np.float32),
                "timestep": np.array([t], np.float32),
                "encoder_hidden_states": states(text),
            }
            errors.append(((sessions("unet").run(feeds)["out_sample"] - noise) ** 2).mean())
        return float(np.mean(errors))

    gains = np.array([1 - error(hit, TEXT) / error(hit, "") for hit in found[:K]])
    scores = np.array([hit.score for hit in found[:K]])
    combined = (scores - scores.mean()) / scores.std() + 1.5 * (gains - gains.mean()) / gains.std()
    order = np.argsort(-combined)
    assert ids(page) == [found[k].id for k in order] + ids(found[K:])
    assert ids(page) != ids(found)
    np.testing.assert_allclose([hit.rerank_score for hit in page[:K]], combined[order], atol=1e-4)
    np.testing.assert_allclose([hit.gain for hit in page[:K]], gains[order], atol=1e-5)
    assert [hit.score for hit in page[:K]] == pytest.approx(scores[order])
    assert all(hit.rerank_score is hit.gain is None for hit in [*page[K:], *found])


def test_rerank_true_means_the_candidates_of_the_bundle(shop: Catalog) -> None:
    assert ids(shop.search(TEXT, rerank=True)) == ids(shop.search(TEXT, rerank=RERANK["candidates"]))
    assert [hit.gain is not None for hit in shop.search(TEXT, rerank=True)] == [True] * 5 + [False] * 5


def test_the_same_search_returns_the_same_scores(shop: Catalog, toy: Path, tmp_path: Path) -> None:
    """Repeated, in a batch, after others, in another process's catalog, and with prepared latents."""
    page = shop.search(TEXT, rerank=K)
    batch = shop.search_batch(["coat", TEXT, {"text": TEXT, "like": 3}, TEXT], rerank=K)
    with Catalog(tmp_path / "other.catalog", toy, rerank=True) as other:
        fill(other)
        pages = [shop.search(TEXT, rerank=K), batch[1], batch[3], other.search(TEXT, rerank=K)]
        pages.append(asyncio.run(other.asearch(TEXT, rerank=K)))
    for again in pages:
        assert ids(again) == ids(page)
        np.testing.assert_allclose(
            [hit.rerank_score for hit in again[:K]], [h.rerank_score for h in page[:K]], atol=1e-4
        )
    assert ids(shop.search("coat", rerank=K)) == ids(batch[0])
    assert ids(shop.search(TEXT, like=3, rerank=K)) == ids(batch[2])


def test_equal_images_are_ordered_by_id(toy: Path) -> None:
    image, other = images(2, seed=9)
    with Catalog(bundle=toy) as catalog:
        catalog.add([image] * 6 + [other], ids=list(range(7)))
        plain, page = catalog.search(TEXT, limit=7), catalog.search(TEXT, rerank=7, limit=7)
        equal = [hit for hit in page if hit.id != 6]
        assert len({hit.rerank_score for hit in equal}) == 1
        assert ids(equal) == [hit.id for hit in plain if hit.id != 6]  # which orders equal scores by id
        alone = catalog.search(TEXT, where={"id": 6}, rerank=7)[0] if catalog.count({"id": 6}) else None
        assert alone is None or alone.rerank_score == 0


# ---------------------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("options", [{}, {"group_by": "shelf"}, {"where": {"even": True}}, {"hybrid": True}])
@pytest.mark.parametrize("limit", [3, K, 11])
def test_pages_by_offset_and_by_cursor_join_to_the_whole_ranking(shop: Catalog, limit: int, options: Any) -> None:
    text = "item 7"
    whole = shop.search(text, rerank=K, limit=ITEMS, **options)
    by_offset = [shop.search(text, rerank=K, limit=limit, offset=k, **options) for k in range(0, len(whole), limit)]
    assert [id for page in by_offset for id in ids(page)] == ids(whole)
    page, by_cursor = by_offset[0], [by_offset[0]]
    while page.cursor:
        page = shop.search(text, rerank=K, limit=limit, cursor=page.cursor, **options)
        by_cursor.append(page)
    assert [id for page in by_cursor for id in ids(page)] == ids(whole)
    assert [page.offset for page in by_cursor] == [page.offset for page in by_offset]
    with pytest.raises(OptionError, match="belongs to another search"):
        shop.search(text, limit=limit, cursor=shop.search(text, rerank=K, limit=3, **options).cursor, **options)


def test_rerank_with_groups_reranks_the_best_item_of_each_group(shop: Catalog) -> None:
    plain = shop.search(TEXT, group_by="shelf", limit=10)
    page = shop.search(TEXT, group_by="shelf", rerank=6, limit=10)
    assert set(ids(page[:6])) == set(ids(plain[:6]))
    assert ids(page[6:]) == ids(plain[6:])
    assert len({hit.payload["shelf"] for hit in page}) == 10


def test_filters_and_min_score_apply_before_reranking(shop: Catalog) -> None:
    plain = shop.search(TEXT, where={"even": True}, limit=K)
    page = shop.search(TEXT, where={"even": True}, rerank=K, limit=K)
    assert set(ids(page)) == set(ids(plain))
    threshold = plain[4].score - 1e-6
    assert len(shop.search(TEXT, where={"even": True}, min_score=threshold, rerank=K, limit=K)) == 5
    with pytest.warns(UserWarning, match="compares the column"):
        assert len(shop.search(TEXT, where={"even": "nothing"}, rerank=K)) == 0


def test_reranking_stops_at_the_candidates(toy: Path) -> None:
    """A page after the candidates costs no call of the UNet."""
    with Catalog(bundle=open_recorded(toy)) as catalog:
        fill(catalog)
        catalog.search(TEXT, rerank=4)
        unet = recorded(catalog.bundle, "unet")
        assert sum(unet.batches) == 2 * 2 * 4  # with and without the text, at two timesteps, for four items
        catalog.search(TEXT, rerank=4, offset=4)
        catalog.search(TEXT, rerank=4)  # without a text, the errors are known
        assert sum(unet.batches) == 2 * 2 * 4 + 2 * 4
        catalog.search_batch([TEXT, TEXT], rerank=4)
        assert sum(unet.batches) == 2 * 2 * 4 + 4 * 4  # the pairs of a batch are measured once


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("rerank", [1, -1, MAX_RERANKED + 1, 8.0, "8", None, np.float32(2), [8]])
def test_rerank_out_of_range_is_an_option_error(shop: Catalog, rerank: Any) -> None:
    with pytest.raises(OptionError, match="give True, False, or the number of items to re-rank, 2 to 64"):
        shop.search(TEXT, rerank=rerank)


@pytest.mark.parametrize("rerank", [0, False, 2, MAX_RERANKED, True, np.int64(8)])
def test_rerank_within_range(shop: Catalog, rerank: Any) -> None:
    assert len(shop.search(TEXT, rerank=rerank, limit=3)) == 3


def test_rerank_and_diversity_exclude_each_other() -> None:
    with pytest.raises(OptionError, match="rerank= and diversity= exclude each other"):
        SearchOptions(rerank=8, diversity=0.3)


def test_rerank_needs_a_text(shop: Catalog) -> None:
    image = images(1)[0]
    for query in ({"image": image}, {"like": 3}, {"without": "boots"}, {"vector": np.ones(8)}):
        with pytest.raises(OptionError, match="rerank= compares images with a text"):
            shop.search(rerank=4, **query)
    with pytest.raises(OptionError, match="this query searches by image"):
        shop.search(TEXT, image=image, weights=(0, 1), rerank=4)
    with pytest.raises(OptionError, match="rerank= compares images with a text"):
        shop.search_batch([TEXT, {"image": image}], rerank=4)


def test_an_image_in_the_query_counts_for_the_encoder_only(shop: Catalog) -> None:
    image = images(1, seed=4)[0]
    plain, page = (shop.search(TEXT, image=image, rerank=rerank, limit=K) for rerank in (0, K))
    assert set(ids(page)) == set(ids(plain))
    by_gain = {hit.id: hit.gain for hit in shop.search(TEXT, rerank=ITEMS, limit=ITEMS)}
    for hit in page:
        assert hit.gain == pytest.approx(by_gain[hit.id], abs=1e-5)


@pytest.mark.parametrize("missing", ["unet", "vae_encoder"])
def test_rerank_without_a_generator_is_a_bundle_error(toy: Path, tmp_path: Path, missing: str) -> None:
    graphs = {
        name: {"file": f"{name}/model.onnx", "precision": "fp32", "inputs": inputs}
        for name, inputs in INPUTS.items()
        if name != missing
    }
    bundle = make_toy_bundle(tmp_path / "bundle", graphs=graphs)
    with Catalog(tmp_path / "a.catalog", bundle) as catalog:
        fill(catalog)
        for call in (lambda: catalog.search(TEXT, rerank=4), catalog.prepare_rerank):
            with pytest.raises(BundleError, match=f"rerank= needs a generator, but .* has no {missing}"):
                call()
        assert len(catalog.search(TEXT)) == 10
    with pytest.raises(BundleError, match="rerank= needs a generator"):
        Catalog(tmp_path / "b.catalog", bundle, rerank=True)
    with Catalog(tmp_path / "b.catalog", bundle) as catalog:  # the failed opening released the folder
        assert len(catalog) == 0


def test_rerank_of_an_item_without_its_image_names_the_item(toy: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for k, image in enumerate(images(3)):
        image.save(photos / f"{k}.png")
    with Catalog(tmp_path / "a.catalog", toy) as catalog:
        catalog.add([photos / f"{k}.png" for k in range(3)], ids=["A", "B", "C"], copy=False)
        (photos / "1.png").unlink()
        with pytest.raises(ImageError, match=r"rerank= needs the image of 'B'.*search without rerank="):
            catalog.search(TEXT, rerank=3)
        with pytest.warns(UserWarning, match=r"1 of 3 items were skipped.*'B'"):
            assert catalog.prepare_rerank() == 2
        assert len(catalog.search(TEXT)) == 3


@pytest.mark.parametrize("graph", ["unet", "vae_encoder"])
def test_values_that_are_not_finite_are_a_generation_error(toy: Path, graph: str) -> None:
    bundle = open_recorded(toy)
    with Catalog(bundle=bundle) as catalog:
        fill(catalog)
        before = ids(catalog.search(TEXT))
        recorded(bundle, graph).alter_outputs = lambda outputs: {k: v * np.nan for k, v in outputs.items()}
        with pytest.raises(GenerationError, match="not finite"):
            catalog.search(TEXT, rerank=4)
        with pytest.raises(GenerationError, match="not finite"):
            catalog.prepare_rerank()
        assert not latent_files(catalog)
        recorded(bundle, graph).alter_outputs = dict
        assert ids(catalog.search(TEXT)) == before
        assert len(catalog.search(TEXT, rerank=4)) == 10  # nothing damaged was kept


def test_items_are_stored_although_they_cannot_be_prepared(toy: Path) -> None:
    bundle = open_recorded(toy)
    with Catalog(bundle=bundle, rerank=True) as catalog:
        recorded(bundle, "unet").alter_outputs = lambda outputs: {k: v * np.nan for k, v in outputs.items()}
        with pytest.warns(UserWarning, match=r"The items are stored, but not prepared for rerank=: .* not finite"):
            fill(catalog)
        assert len(catalog) == ITEMS
        recorded(bundle, "unet").alter_outputs = dict
        assert catalog.prepare_rerank() == ITEMS


def test_only_the_text_that_breaks_the_unet_fails(toy: Path) -> None:
    bundle = open_recorded(toy)
    with Catalog(bundle=bundle) as catalog:
        fill(catalog)
        catalog.search(TEXT, rerank=4)
        recorded(bundle, "unet").alter_outputs = lambda outputs: {k: v * np.inf for k, v in outputs.items()}
        with pytest.raises(GenerationError, match=r"the unet .* not finite for the image of"):
            catalog.search(TEXT, rerank=4)


# ---------------------------------------------------------------------------------------------------- the manifest


def with_rerank(folder: Path, rerank: Any) -> Path:
    """Replace the section of a bundle's manifest. Graphs and fingerprint stay."""
    values = json.loads((folder / "manifest.json").read_text())
    values["rerank"] = rerank
    values["checksum"] = manifest_checksum(values)
    (folder / "manifest.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timesteps": []}, "rerank.timesteps is empty"),
        ({"timesteps": [-1]}, r"rerank.timesteps\[0\] is -1; it must be an integer from 0"),
        ({"timesteps": 650}, "rerank.timesteps is 650; it must be a list"),
        ({"timesteps": [650.5]}, r"rerank.timesteps\[0\] is 650.5; it must be an integer"),
        ({"noise_seed": -1}, "rerank.noise_seed is -1; it must be an integer from 0"),
        ({"candidates": 0}, "rerank.candidates is 0; it must be an integer from 1"),
        ({"weight": 0}, "rerank.weight is 0; it must be a number from"),
        (
            {"gain": GAIN | {"recall_at_1": 1.2}},
            "rerank.gain.recall_at_1 is 1.2; it must be a number from 0 to 1",
        ),
        ({"gain": GAIN | {"recall_at_1": "x"}}, "rerank.gain.recall_at_1 is 'x'"),
    ],
)
def test_a_damaged_section_of_the_manifest_is_a_bundle_error(tmp_path: Path, changes: Any, message: str) -> None:
    folder = make_toy_bundle(tmp_path / "bundle", rerank=RERANK | changes)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_timesteps_beyond_the_schedule_are_a_bundle_error(tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", rerank=RERANK | {"timesteps": [1000]})
    with Catalog(bundle=bundle) as catalog:
        fill(catalog)
        with pytest.raises(BundleError, match="the model has timesteps 0 to 999"):
            catalog.search(TEXT, rerank=4)


@pytest.mark.parametrize("changes", [{"candidates": 1}, {"candidates": 65}, {"timesteps": [500] * 17}])
def test_settings_that_cost_too_much_are_a_bundle_error(tmp_path: Path, changes: Any) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", rerank=RERANK | changes)
    with Catalog(bundle=bundle) as catalog:
        fill(catalog)
        with pytest.raises(BundleError, match=r"they must be 2 to 64, and at most 16\. Run: unidiff-export rerank"):
            catalog.search(TEXT, rerank=True)


def test_the_section_is_read_as_it_was_written(toy: Path) -> None:
    manifest = Manifest.read(toy)
    assert manifest.to_json()["rerank"] == RERANK
    assert Manifest.from_json(manifest.to_json(), toy / "manifest.json") == manifest


def test_warning_without_a_measured_gain(tmp_path: Path) -> None:
    folder = make_toy_bundle(tmp_path / "bundle")

    def searched(rerank: Any) -> list[str]:
        with_rerank(folder, rerank)
        with Catalog(bundle=folder) as catalog, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fill(catalog)
            catalog.search(TEXT)
            catalog.search(TEXT, rerank=4)
        return [str(warning.message) for warning in caught if "rerank=" in str(warning.message)]

    assert searched(RERANK) == []
    assert "whether it gains with this model was not measured" in searched(None)[0]
    assert "was not measured" in searched(RERANK | {"gain": None})[0]
    no_gain = searched(RERANK | {"gain": GAIN | {"reranked_recall_at_1": 0.8}})
    assert "does not gain" in no_gain[0]
    assert "0.800 without it and 0.800 with it, over 100 captions" in no_gain[0]


# ---------------------------------------------------------------------------------------------------- prepared latents


def test_prepared_latents_are_not_computed_again(toy: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    with Catalog(tmp_path / "a.catalog", open_watched(toy, lambda graph, feeds: calls.append(graph))) as catalog:
        fill(catalog)
        assert catalog.prepare_rerank() == ITEMS
        assert catalog.prepare_rerank() == 0
        assert len(latent_files(catalog)) == ITEMS
        assert asyncio.run(catalog.aprepare_rerank()) == 0
        page = catalog.search(TEXT, rerank=K)
    calls.clear()
    with Catalog(tmp_path / "a.catalog", open_watched(toy, lambda graph, feeds: calls.append(graph))) as catalog:
        assert [(hit.id, hit.gain) for hit in catalog.search(TEXT, rerank=K)] == [(hit.id, hit.gain) for hit in page]
        assert "vae_encoder" not in calls


def test_an_interrupted_preparation_continues(toy: Path, tmp_path: Path) -> None:
    def interrupt(graph: str, feeds: Any) -> None:
        if graph == "unet":
            raise KeyboardInterrupt

    with Catalog(tmp_path / "a.catalog", toy) as catalog:
        catalog.add(images()[:10], ids=list(range(10)))
        assert catalog.prepare_rerank() == 10
    with Catalog(tmp_path / "a.catalog", open_watched(toy, interrupt)) as catalog:
        fill(catalog)
        with pytest.raises(KeyboardInterrupt):
            catalog.prepare_rerank()
        assert len(latent_files(catalog)) == 10
    with Catalog(tmp_path / "a.catalog", toy) as catalog:
        assert catalog.prepare_rerank() == ITEMS - 10


def test_latents_follow_their_images(toy: Path, tmp_path: Path) -> None:
    """Adding, replacing, sharing and deleting images; reindexing with another bundle; restoring an export."""
    first, second, third = images(3, seed=5)
    with Catalog(tmp_path / "a.catalog", toy, rerank=True) as catalog:
        catalog.add([first, first, second], ids=["A", "B", "C"])
        assert len(latent_files(catalog)) == 2
        catalog.add(third, ids="C")  # replaces the second image
        catalog.delete("A")  # B has the same image
        names = {file.stem for file in latent_files(catalog)}
        assert names == {catalog.get("B").sha256, catalog.get("C").sha256}
        page = catalog.search(TEXT, rerank=2)
        other = make_toy_bundle(tmp_path / "other", seed=1, rerank=RERANK)
        catalog.reindex(other)
        assert {file.parts[-3] for file in latent_files(catalog)} == {f"latents-{catalog.bundle.fingerprint[:12]}"}
        assert len(latent_files(catalog)) == 2
        assert catalog.search(TEXT, rerank=2)[0].gain != page[0].gain
        catalog.delete(["B", "C"])
        assert latent_files(catalog) == []


def test_restored_catalogs_compute_their_latents_again(shop: Catalog, toy: Path, tmp_path: Path) -> None:
    shop.export(tmp_path / "shop.parquet")
    page = shop.search(TEXT, rerank=K)
    with Catalog.restore(tmp_path / "shop.parquet", tmp_path / "b.catalog", rerank=True) as restored:
        assert len(latent_files(restored)) == ITEMS
        assert ids(restored.search(TEXT, rerank=K)) == ids(page)


def test_add_folder_prepares(toy: Path, small_catalog: Path, tmp_path: Path) -> None:
    with Catalog(tmp_path / "a.catalog", toy, rerank=True) as catalog:
        catalog.add_folder(small_catalog)
        assert len(latent_files(catalog)) == len({hit.sha256 for hit in catalog.browse(limit=100)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-3],
        lambda data: data + b"x",
        lambda data: data[:60] + bytes([data[60] ^ 1]) + data[61:],
        lambda data: b"PNG" + data[3:],
        lambda data: nan_in(data),
        lambda data: other_size(data),
    ],
    ids=["empty", "header", "short", "long", "flipped", "magic", "nan", "shape"],
)
def test_damaged_latents_are_computed_again(toy: Path, tmp_path: Path, damage: Any) -> None:
    with Catalog(tmp_path / "a.catalog", toy, rerank=True) as catalog:
        fill(catalog)
        page = catalog.search(TEXT, rerank=K)
        file = next(f for f in latent_files(catalog) if f.stem == page[0].sha256)
        good = file.read_bytes()
        file.write_bytes(damage(good))
    with Catalog(tmp_path / "a.catalog", toy) as catalog, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = catalog.search(TEXT, rerank=K)
        assert ids(again) == ids(page)
        assert [hit.gain for hit in again[:K]] == pytest.approx([hit.gain for hit in page[:K]])
        damaged = [str(warning.message) for warning in caught if "are damaged" in str(warning.message)]
        assert len(damaged) <= 1
        assert damaged or ImageLatents.from_bytes(file.read_bytes()).latents.shape != (
            CHANNELS,
            LATENT_SIZE,
            LATENT_SIZE,
        )
        assert catalog.prepare_rerank() == 1
        assert (
            ImageLatents.from_bytes(file.read_bytes()).latents.tobytes()
            == ImageLatents.from_bytes(good).latents.tobytes()
        )


def nan_in(data: bytes) -> bytes:
    latents = ImageLatents.from_bytes(data)
    return ImageLatents(latents.latents * np.float16("nan"), latents.errors, latents.noise_seed).to_bytes()


def other_size(data: bytes) -> bytes:
    latents = ImageLatents.from_bytes(data)
    return ImageLatents(latents.latents[:, :3], latents.errors, latents.noise_seed).to_bytes()


def test_a_link_in_the_place_of_latents_is_not_followed(toy: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.write_bytes(b"mine")
    with Catalog(tmp_path / "a.catalog", toy, rerank=True) as catalog:
        fill(catalog)
        file = latent_files(catalog)[0]
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(StoreError, match="symbolic link"):
            catalog.prepare_rerank()
        assert target.read_bytes() == b"mine"


def test_other_timesteps_complete_the_errors_and_keep_the_latents(toy: Path, tmp_path: Path) -> None:
    bundle = make_toy_bundle(tmp_path / "bundle", rerank=RERANK)
    with Catalog(tmp_path / "a.catalog", bundle, rerank=True) as catalog:
        fill(catalog)
    with_rerank(bundle, RERANK | {"timesteps": [700, 800]})
    calls: list[str] = []
    with Catalog(tmp_path / "a.catalog", open_watched(bundle, lambda graph, feeds: calls.append(graph))) as catalog:
        page = catalog.search(TEXT, rerank=K)
        assert "vae_encoder" not in calls
        assert catalog.prepare_rerank() == ITEMS
        assert "vae_encoder" not in calls
    with Catalog(bundle=bundle) as fresh:
        fill(fresh)
        again = fresh.search(TEXT, rerank=K)
    np.testing.assert_allclose([hit.gain for hit in page[:K]], [hit.gain for hit in again[:K]], atol=1e-5)


# ---------------------------------------------------------------------------------------------------- parts


def test_latent_cache_is_bounded_and_keeps_the_last_used() -> None:
    entry = ImageLatents(np.zeros((4, 8, 8), np.float16), {600: 1.0}, 0)
    cache = LatentCache(max_bytes=3 * entry.size)
    for name in "abc":
        cache.put(name, entry)
    cache.get("a")
    cache.put("d", entry)
    cache.put("d", entry)
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]
    assert cache.size == 3 * entry.size
    LatentCache(max_bytes=1).put("a", entry)  # larger than the whole cache


def test_latents_of_other_bundles_are_removed_and_nothing_else(tmp_path: Path) -> None:
    store = LatentStore(tmp_path, "0123456789abcdef")
    entry = ImageLatents(np.zeros((4, 8, 8), np.float16), {}, 0)
    store.write("ab" * 32, entry)
    for name in ("latents-fedcba987654", "latents-mine", "latents-0123456789abcdef", "vectors"):
        (tmp_path / name).mkdir()
    (tmp_path / "latents-aaaaaaaaaaaa").symlink_to(tmp_path / "vectors")
    store.remove_others()
    assert {path.name for path in tmp_path.iterdir()} == {
        "latents-0123456789ab",
        "latents-0123456789abcdef",
        "latents-aaaaaaaaaaaa",
        "latents-mine",
        "vectors",
    }
    store.remove("../../etc/passwd")
    store.remove("ab" * 32)
    assert store.read("ab" * 32) is None


def test_scores_of_equal_items_are_zero() -> None:
    np.testing.assert_array_equal(combined_scores([0.5] * 4, [0.2] * 4, 1.0), np.zeros(4))
    np.testing.assert_array_equal(combined_scores([0.5], [0.2], 1.0), [0.0])
    np.testing.assert_allclose(gains_of(np.array([[2.0, 4.0]]), np.array([[1.0, 2.0]])), [0.5])


def test_predictions_share_calls_with_generations(toy: Path) -> None:
    """While an image is generated, the rows of a search join its calls and change no pixel."""
    started, joined = threading.Event(), threading.Event()
    batches: list[int] = []

    def watch(graph: str, feeds: Any) -> None:
        if graph == "unet":
            batches.append(len(feeds["sample"]))

    bundle = open_watched(toy, watch)
    generator = Generator(bundle)
    rng = np.random.default_rng(0)
    samples = list(rng.standard_normal((3, CHANNELS, LATENT_SIZE, LATENT_SIZE), dtype=np.float32))
    states, timesteps = [generator.conditions("boots")] * 3, [600, 700, 800]
    expected = generator.predict(samples, timesteps, states)
    alone = generator.generate("coat", seed=1, steps=8)[0]
    batches.clear()
    results: list[np.ndarray] = []

    def generate() -> None:
        def wait(done: int, total: int) -> None:
            started.set()
            joined.wait(0.02)

        images.append(generator.generate("coat", seed=1, steps=8, callback=wait)[0])

    images: list[Image.Image] = []
    thread = threading.Thread(target=generate)
    thread.start()
    assert started.wait(20)
    for _ in range(20):
        results.append(generator.predict(samples, timesteps, states))
    joined.set()
    thread.join()
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-6)
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(alone)).max() <= 1
