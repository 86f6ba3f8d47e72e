"""The catalog with a bundle that embeds colors, so that every expected result is obvious."""

from __future__ import annotations

import pickle
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.color_bundle import COLORS, color_image, make_color_bundle

from unidiff_sdk import (
    Bundle,
    BundleError,
    Catalog,
    FilterError,
    Hit,
    ImageError,
    OptionError,
    Page,
    StoreError,
)
from unidiff_sdk._internal.images import load_image
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.store import Record
from unidiff_sdk.store.edge.store import EdgeStore
from unidiff_sdk.store.images import ImageStore


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_color_bundle(tmp_path_factory.mktemp("bundles") / "colors")


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        yield catalog


def fill(catalog: Catalog) -> None:
    catalog.add(
        [color_image(color) for color in COLORS],
        [f"a {color} dress" for color in COLORS],
        ids=list(COLORS),
        payloads=[{"price": 10.0 * n, "tags": ["new"] if n % 2 else []} for n in range(len(COLORS))],
    )


# ------------------------------------------------------------------------------------------------ searching


def test_search_by_text(catalog: Catalog) -> None:
    fill(catalog)
    page = catalog.search("red dress", limit=2)
    assert isinstance(page, Page)
    assert page[0].id == "red"
    assert page[0].text == "a red dress"
    assert page[0].payload == {"price": 0.0, "tags": []}
    assert page[0].score > page[1].score
    assert len(page) == 2
    assert page.took_ms > 0


@pytest.mark.parametrize("kind", ["pil", "array", "bytes", "path", "str", "hit"])
def test_search_by_image(catalog: Catalog, tmp_path: Path, kind: str) -> None:
    fill(catalog)
    file = tmp_path / "query.png"
    color_image("blue").save(file)
    image: Any = {
        "pil": lambda: color_image("blue"),
        "array": lambda: np.asarray(color_image("blue")),
        "bytes": file.read_bytes,
        "path": lambda: file,
        "str": lambda: str(file),
        "hit": lambda: catalog.get("blue"),
    }[kind]()
    hit = catalog.search(image=image, limit=1)[0]
    assert hit.id == "blue"
    assert hit.score == pytest.approx(1, abs=1e-3)


def test_search_by_a_generated_image(catalog: Catalog) -> None:
    generated = catalog.generate("blue shoe", seed=9)[0]
    catalog.add([color_image("red"), generated.image], ids=["red", "generated"])
    hit = catalog.search(image=generated, limit=1)[0]
    assert hit.id == "generated" and hit.score == pytest.approx(1, abs=1e-5)


def test_weights_balance_text_and_image(catalog: Catalog) -> None:
    fill(catalog)
    assert catalog.search("red", image=color_image("blue"), weights=(0.9, 0.1))[0].id == "red"
    assert catalog.search("red", image=color_image("blue"), weights=(0.1, 0.9))[0].id == "blue"


def test_offset_skips_the_best_hits(catalog: Catalog) -> None:
    fill(catalog)
    everything = [hit.id for hit in catalog.search("red")]
    assert [hit.id for hit in catalog.search("red", limit=2, offset=1)] == everything[1:3]


def test_where_filters_hits_and_counts(catalog: Catalog) -> None:
    fill(catalog)
    assert {hit.id for hit in catalog.search("red", where={"price": {"gte": 10, "lt": 30}})} == {"green", "blue"}
    assert {hit.id for hit in catalog.search("red", where={"tags": "new"})} == {"green", "yellow"}
    assert [hit.id for hit in catalog.search("red", where={"id": ["blue"]})] == ["blue"]
    assert [hit.id for hit in catalog.search("red", where={"text": "a blue dress"})] == ["blue"]
    assert catalog.count({"price": {"lt": 15}}) == 2
    assert len(catalog.search("red", where={"price": 99})) == 0


def test_empty_catalog(catalog: Catalog) -> None:
    assert list(catalog.search("red")) == []
    assert catalog.count() == len(catalog) == 0
    assert catalog.get("x") is None
    assert catalog.delete("x") == 0
    assert catalog.generate("red dress", seed=0)[0].nearest is None
    assert catalog


def test_search_batch_warns_about_an_unknown_column(catalog: Catalog) -> None:
    fill(catalog)
    with pytest.warns(UserWarning, match='No item has a column "prize". Columns: id, price, tags, text'):
        assert [len(page) for page in catalog.search_batch(["red", "blue"], where={"prize": 3})] == [0, 0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "The query is empty"),
        ({"text": "  "}, "text='  ': give a non-empty string"),
        ({"text": 7}, "text=7: give a non-empty string"),
        ({"text": "red", "limit": 0}, "limit=0"),
        ({"text": "red", "limit": 10_001}, "10,000"),
        ({"text": "red", "offset": -1}, "offset=-1"),
        ({"text": "red", "image": color_image("red"), "weights": (1, -1)}, "weights"),
        ({"text": "red", "image": color_image("red"), "weights": (0, 0)}, "weights"),
        ({"text": "red", "image": color_image("red"), "weights": (float("nan"), 1)}, "weights"),
        ({"text": "red", "image": color_image("red"), "weights": 0.5}, "weights"),
        ({"text": "red", "image": color_image("red"), "weights": (1, 2, 3)}, "weights"),
    ],
)
def test_search_refuses_invalid_arguments(catalog: Catalog, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        catalog.search(**arguments)


def test_search_refuses_invalid_filters_and_images(catalog: Catalog) -> None:
    with pytest.raises(FilterError, match="Valid operators"):
        catalog.search("red", where={"price": {"below": 3}})
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        catalog.search(image="nowhere.png")


# ------------------------------------------------------------------------------------------------ adding


def test_ids_are_strings_or_integers(catalog: Catalog) -> None:
    assert catalog.add(color_image("red"), ids="7") == ["7"]
    assert catalog.add(color_image("blue"), ids=7) == [7]
    assert catalog.count() == 2
    red, blue = catalog.get("7"), catalog.get(7)
    assert red and blue and red.id == "7" and blue.id == 7 and red.sha256 != blue.sha256
    assert catalog.add([color_image("green")] * 2, ids=np.arange(2)) == [0, 1]


def test_adding_twice_without_ids_has_no_effect(catalog: Catalog) -> None:
    first = catalog.add([color_image("red"), color_image("blue")], ["one", "two"])
    assert catalog.add([color_image("red"), color_image("blue")], ["one", "two"]) == first
    assert catalog.count() == 2
    catalog.add(color_image("red"), "another caption")
    assert catalog.count() == 3


def test_same_id_replaces_item_and_image(catalog: Catalog) -> None:
    catalog.add(color_image("red"), "a red dress", "dress", {"price": 1})
    old = catalog.get("dress")
    catalog.add(color_image("blue"), "a blue dress", "dress", {"size": "M"})
    new = catalog.get("dress")
    assert old and new
    assert (new.text, new.payload, catalog.count()) == ("a blue dress", {"size": "M"}, 1)
    with pytest.raises(ImageError):
        old.load_image()
    assert catalog.search("blue")[0].score == pytest.approx(catalog.search(image=color_image("blue"))[0].score, abs=0.1)


def test_payload_values_are_stored_as_json(catalog: Catalog) -> None:
    import datetime

    given = {"n": np.int64(3), "x": np.float32(0.5), "day": datetime.date(2024, 5, 1), "list": (1, "a"), "none": None}
    catalog.add(color_image("red"), ids="a", payloads={**given, "nested": {"größe": [True]}})
    hit = catalog.get("a")
    assert hit and hit.text is None
    expected = {"n": 3, "x": 0.5, "day": "2024-05-01", "list": [1, "a"], "none": None, "nested": {"größe": [True]}}
    assert hit.payload == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"texts": ["only one"]}, "got 2 images and 1 texts"),
        ({"texts": "only one"}, "got 2 images and 1 texts"),
        ({"ids": ["a", "b", "c"]}, "got 2 images and 3 ids"),
        ({"payloads": {}}, "got 2 images and 1 payloads"),
        ({"texts": ["fine", "  "]}, "caption '  ' is not a non-empty string"),
        ({"texts": ["fine", 3]}, "caption 3 is not a non-empty string"),
        ({"ids": ["a", "a"]}, "'a' occurs 2 times: ids must be unique"),
        ({"ids": ["a", ""]}, "not an id"),
        ({"ids": ["a", True]}, "not an id"),
        ({"ids": ["a", 1.5]}, "not an id"),
        ({"ids": ["a", 2**70]}, "64 bits"),
        ({"payloads": [{}, {"x": float("nan")}]}, "payload.x is nan: give a JSON value"),
        ({"payloads": [{}, {"x": object()}]}, "give a JSON value"),
        ({"payloads": [{}, {"x": {1: 2}}]}, "give a JSON value"),
        ({"payloads": [{}, {"text": "x"}]}, '"text" is a reserved column name'),
        ({"payloads": [{}, {"a\\b": 1}]}, "without double quotes and backslashes"),
        ({"payloads": [{}, 3]}, "payload 3 is not a dictionary"),
    ],
)
def test_add_refuses_invalid_arguments_and_stores_nothing(
    catalog: Catalog, arguments: dict[str, Any], says: str
) -> None:
    fill(catalog)
    with pytest.raises(OptionError, match=says):
        catalog.add([color_image("red", (9, 9)), color_image("blue", (9, 9))], **arguments)
    assert catalog.count() == len(COLORS)


def test_add_stores_nothing_if_one_image_is_unusable(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog)
    truncated = tmp_path / "truncated.jpg"
    Image.effect_noise((200, 200), 90).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:3000])
    many = [color_image((k, k, 200)) for k in range(40)]  # so that the unusable image is in the second batch
    for unusable in (truncated, b"not an image", tmp_path / "missing.png", np.zeros((3, 3, 7)), object()):
        with pytest.raises(ImageError):
            catalog.add([*many, unusable])
    with pytest.raises(BundleError, match="zero or not finite"):
        catalog.add([*many, color_image((0, 0, 0))])  # this bundle embeds black as the zero vector
    assert catalog.count() == len(COLORS)


def test_image_error_names_the_file(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_bytes(b"GIF8 no")
    with pytest.raises(ImageError, match=r"fake\.png: not an image"):
        catalog.add(tmp_path / "fake.png")


def test_adding_hits_copies_captions_and_columns(catalog: Catalog, bundle: Path) -> None:
    fill(catalog)
    with Catalog(":memory:", bundle) as selection:
        assert selection.add(catalog.search("red", limit=2), payloads=[{"price": 99}, {}]) == ["red", "yellow"]
        hit = selection.get("red")
        assert hit and (hit.text, hit.payload) == ("a red dress", {"price": 99, "tags": []})
        assert selection.add(selection.search("red")) == ["red", "yellow"]
        assert selection.count() == 2


def test_delete_keeps_images_that_other_items_use(catalog: Catalog) -> None:
    fill(catalog)
    catalog.add(color_image("red"), "the same image", "copy")
    red = catalog.get("red")
    assert red
    assert catalog.delete(["red", "nobody"]) == 1
    assert red.load_image().size == (40, 30)
    assert catalog.delete(catalog.search("red", where={"id": "copy"})) == 1
    with pytest.raises(ImageError):
        red.load_image()
    assert catalog.count() == len(COLORS) - 1


def test_sixteen_threads_add_search_and_delete(catalog: Catalog) -> None:
    fill(catalog)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for step in range(6):
                name = f"{thread}-{step}"
                catalog.add(color_image((10 * step + 20, 10 * thread + 20, 99)), ids=name, payloads={"thread": thread})
                hit = catalog.get(name)
                assert hit and hit.load_image().size == (40, 30)
                assert catalog.search("red", where={"thread": thread}, limit=50)
                if step % 2:
                    catalog.delete(name)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert catalog.count() == len(COLORS) + 16 * 3


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ["jpg", "bytes", "pil", "array"])
def test_images_are_stored_without_loss(catalog: Catalog, tmp_path: Path, kind: str, copy: bool) -> None:
    noise = Image.effect_noise((300, 200), 90).convert("RGB")
    noise.save(tmp_path / "noise.jpg")
    source: Any = {
        "jpg": tmp_path / "noise.jpg",
        "bytes": (tmp_path / "noise.jpg").read_bytes(),
        "pil": noise,
        "array": np.asarray(noise),
    }[kind]
    catalog.add(source, ids="noise", copy=copy)
    hit = catalog.get("noise")
    assert hit
    expected = load_image(source)
    assert np.array_equal(np.asarray(hit.load_image()), np.asarray(expected))
    assert hit.thumbnail().size == (128, 85)
    if kind == "jpg":
        assert hit.uri == ("../noise.jpg" if not copy else f"images/{hit.sha256[:2]}/{hit.sha256}.jpg")
        catalog.delete("noise")
        assert source.is_file()


def test_reference_outside_the_parent_folder_is_absolute(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "ä image.png"
    color_image("red").save(file)
    with Catalog(tmp_path / "deep" / "shop.catalog", bundle) as catalog:
        catalog.add(file, ids="a", copy=False)
        hit = catalog.get("a")
        assert hit and hit.uri == file.as_uri()
        assert hit.load_image().size == (40, 30)


def test_hits_can_be_pickled(catalog: Catalog) -> None:
    fill(catalog)
    hit = pickle.loads(pickle.dumps(catalog.get("red")))
    assert hit.load_image().getpixel((0, 0)) == COLORS["red"]


def test_missing_thumbnail_is_created_again(catalog: Catalog) -> None:
    fill(catalog)
    shutil.rmtree(catalog.folder / "thumbnails")
    hit = catalog.get("red")
    assert hit and hit.thumbnail().size == (40, 30)


def test_results_are_frozen_and_render_in_notebooks(catalog: Catalog) -> None:
    fill(catalog)
    page = catalog.search("red <b>")
    with pytest.raises(FrozenInstanceError):
        page[0].score = 2  # type: ignore[misc]
    assert "1. 1.000" in repr(page) and "a red dress" in repr(page)
    assert page._repr_html_().count("<img") == 4
    assert "data:image/webp" in page[0]._repr_html_()
    assert isinstance(page[:2], tuple) and all(isinstance(hit, Hit) for hit in page)
    assert "data:image/png" in catalog.generate("red", seed=0)._repr_html_()


# ------------------------------------------------------------------------------------------------ generating


def test_generation_is_ranked_by_the_cosine_with_the_prompt(catalog: Catalog) -> None:
    fill(catalog)
    options: dict[str, Any] = {"negative_prompt": "blue", "steps": 3}
    generation = catalog.generate("red dress", n=4, seed=5, **options)
    encoder = Encoder(catalog.bundle)
    scores = {}
    for seed in range(5, 9):  # each image generated alone and scored by hand
        alone = catalog.generate("red dress", seed=seed, **options)[0]
        scores[seed] = float(encoder.encode_images([alone.image])[0] @ encoder.encode_texts(["red dress"])[0])
    assert [generated.seed for generated in generation] == sorted(scores, key=lambda seed: -scores[seed])
    assert [generated.score for generated in generation] == pytest.approx(sorted(scores.values(), reverse=True))
    best = generation[0]
    assert best.nearest and best.nearest.id == catalog.search(image=best.image, limit=1)[0].id
    settings = (best.prompt, best.negative_prompt, best.steps, best.guidance_scale, best.sampler)
    assert settings == ("red dress", "blue", 3, 3.0, "ddim")
    assert best.bundle == catalog.bundle.fingerprint
    assert len(generation[:2]) == 2


def test_random_seed_is_reported(catalog: Catalog) -> None:
    assert catalog.generate("red")[0].seed != catalog.generate("red")[0].seed


def test_generated_images_are_marked_in_their_columns(catalog: Catalog) -> None:
    generation = catalog.generate("red dress", n=3, seed=5)
    ids = catalog.add(generation)
    assert len(ids) == catalog.count({"generated": True}) == 3
    hit = catalog.get(ids[0])
    assert hit and hit.text == "red dress"
    assert hit.payload["seed"] == generation[0].seed and hit.payload["prompt"] == "red dress"
    assert np.array_equal(np.asarray(hit.load_image()), np.asarray(generation[0].image))
    catalog.add(generation[1], "my own caption", "mine", {"price": 3})
    mine = catalog.get("mine")
    assert mine and mine.text == "my own caption" and mine.payload["price"] == 3


def test_generate_refuses_an_empty_prompt(catalog: Catalog) -> None:
    with pytest.raises(OptionError, match="prompt is ' '"):
        catalog.generate(" ")


def test_real_images_with_a_synthetic_bundle_warn_once(tmp_path: Path) -> None:
    bundle = make_color_bundle(tmp_path / "rendered", synthetic=True)
    with Catalog(bundle=bundle) as catalog:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            catalog.add(color_image("red"), payloads={"catalog": "fashion-man"})
            catalog.add(catalog.generate("red", seed=0))
        with pytest.warns(UserWarning, match="trained on rendered, synthetic products only"):
            catalog.add(color_image("blue"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            catalog.add(color_image("green"))


# ------------------------------------------------------------------------------------------------ from parts


def test_from_parts_searches_adds_and_generates(tmp_path: Path, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    images = ImageStore(tmp_path / "images")
    with Catalog.from_parts(EdgeStore(tmp_path / "vectors", opened.dim), images, opened) as catalog:
        fill(catalog)
        assert catalog.search("red")[0].load_image().getpixel((0, 0)) == COLORS["red"]
        assert catalog.generate("red", seed=0)[0].nearest is not None
        assert catalog.bundle is opened and catalog.folder == tmp_path / "images"
        info = catalog.info()
        assert info["items"] == 4 and info["bundle"]["fingerprint"] == opened.fingerprint
        parts = catalog.parts()
        assert parts.images is images and parts.bundle is opened
        vectors = {record.payload["id"]: record.vector for batch in parts.store.scroll() for record in batch}
        assert vectors.keys() == set(COLORS)
        assert np.allclose(vectors["red"], Encoder(opened).encode_images([color_image("red")])[0], atol=1e-6)
        with pytest.raises(StoreError, match="built by from_parts cannot open a second store"):
            catalog.reindex(bundle)
    assert not (tmp_path / "images" / "catalog.json").exists()
    with Catalog.from_parts(EdgeStore(tmp_path / "vectors", opened.dim), images, opened) as catalog:
        assert catalog.count() == 4
    for call in (catalog.count, catalog.parts):
        with pytest.raises(StoreError, match="closed"):
            call()


def test_from_parts_refuses_other_dimensions(tmp_path: Path, bundle: Path) -> None:
    store = EdgeStore(tmp_path / "vectors", 8)
    with pytest.raises(StoreError, match="The store has 8 dimensions, the bundle 4"):
        Catalog.from_parts(store, ImageStore(tmp_path), Bundle.open(bundle))
    store.close()


class InterferingStore(EdgeStore):
    """Calls a function when records are first retrieved."""

    interfere: Callable[[], None] | None = None

    def retrieve(self, ids: Sequence[str]) -> list[Record]:
        if self.interfere is not None:
            interfere, self.interfere = self.interfere, None
            interfere()
        return super().retrieve(ids)


def test_file_that_changes_while_it_is_added_is_refused(tmp_path: Path, bundle: Path) -> None:
    file = tmp_path / "a.png"
    color_image("red").save(file)
    opened = Bundle.open(bundle)
    store = InterferingStore(tmp_path / "vectors", opened.dim)
    with Catalog.from_parts(store, ImageStore(tmp_path / "images"), opened) as catalog:
        store.interfere = lambda: color_image("blue").save(file)
        with pytest.raises(ImageError, match="changed while"):
            catalog.add(file)
        assert store.interfere is None and catalog.count() == 0
