"""The catalog, with a stand-in for the model that knows one thing: colors. So what a search must find is plain."""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import unidiff_sdk.catalog.catalog
import unidiff_sdk.catalog.snapshot
from unidiff_sdk import BundleError, Catalog, DataError, FilterError, Hit, ImageError, OptionError, Page, StoreError
from unidiff_sdk._internal.images import load_image
from unidiff_sdk.catalog.catalog_file import CatalogFile
from unidiff_sdk.generation.options import GenerationOptions, ResolvedOptions

RGB = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (220, 200, 20)}


class ColorBundle:
    """What the catalog needs of a bundle, read from a little JSON file."""

    synthetic = False

    def __init__(self, path: Path) -> None:
        self.path = path
        self.__dict__.update(json.loads((path / "manifest.json").read_text()))

    @classmethod
    def open(cls, path: Any = None) -> ColorBundle:
        if path is None or not (Path(path) / "manifest.json").is_file():
            raise BundleError(f"{path}: no bundle")
        return cls(Path(path))


class ColorEncoder:
    def __init__(self, bundle: ColorBundle) -> None:
        self.dim = bundle.dim

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        vectors = [np.mean([RGB.get(word, (1, 1, 1)) for word in text.split()], axis=0) for text in texts]
        return self._units(vectors)

    def encode_text(self, text: str) -> np.ndarray:
        return self.encode_texts([text])[0]

    def encode_images(self, images: Sequence[Any]) -> np.ndarray:
        return self.encode_pixels(np.stack([self.pixels(image) for image in images]))

    def pixels(self, image: Any) -> np.ndarray:
        return np.asarray(load_image(image), float).mean(axis=(0, 1))

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        if any(np.allclose(v, 13, atol=0.5) for v in pixels):  # a grey that this model cannot bear
            return np.full((len(pixels), self.dim), np.nan, np.float32)
        return self._units(list(pixels))

    def _units(self, vectors: list[Any]) -> np.ndarray:
        rows = np.zeros((len(vectors), self.dim), np.float32)
        rows[:, :3] = vectors
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class ColorGenerator:
    def __init__(self, bundle: ColorBundle) -> None:
        pass

    def resolve(self, options: GenerationOptions) -> ResolvedOptions:
        defaults = {"seed": secrets.randbelow(2**32), "sampler": "ddim", "steps": 20, "guidance_scale": 4.0}
        given = {name: value for name, value in vars(options).items() if value is not None}
        return ResolvedOptions(**defaults | {"width": 16, "height": 16} | given)

    def run(self, prompts: Sequence[str], options: ResolvedOptions, *, callback: Any, **_: Any) -> list[Image.Image]:
        """The prompt's color with grey in it, the less the larger the seed's last digit."""
        if callback:
            callback(options.n, options.n)
        return [self._picture(prompt, (options.seed + k) % 10) for prompt in prompts for k in range(options.n)]

    def _picture(self, prompt: str, digit: int) -> Image.Image:
        mix = (np.array(RGB[prompt.split()[0]], float) * (digit + 1) + 90 * (9 - digit)) / 10
        return Image.new("RGB", (16, 16), tuple(int(c) for c in mix))


@pytest.fixture(autouse=True)
def color_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (unidiff_sdk.catalog.catalog, unidiff_sdk.catalog.snapshot):
        monkeypatch.setattr(module, "Bundle", ColorBundle)
    monkeypatch.setattr(unidiff_sdk.catalog.snapshot, "Encoder", ColorEncoder)
    monkeypatch.setattr("unidiff_sdk.generation.generator.Generator", ColorGenerator)


def make_bundle(path: Path, fingerprint: str = "aaaa", dim: int = 4, **more: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    content = {"name": path.name, "fingerprint": fingerprint, "dim": dim, **more}
    (path / "manifest.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


@pytest.fixture
def catalog(tmp_path: Path, bundle: Path) -> Iterator[Catalog]:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        yield catalog


def picture(colour: str | tuple[int, int, int], size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, RGB[colour] if isinstance(colour, str) else colour)


def fill(catalog: Catalog) -> None:
    catalog.add(
        [picture(colour) for colour in RGB],
        [f"a {colour} dress" for colour in RGB],
        ids=list(RGB),
        payloads=[{"price": 10.0 * n, "tags": ["new"] if n % 2 else []} for n in range(len(RGB))],
    )


def write_folder(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        colour = row.pop("colour", None)
        if colour:
            picture(colour).save(folder / row["file_name"])
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def products(folder: Path, n: int = 70) -> Path:
    """More than two batches, each picture another shade."""
    colors = list(RGB)
    return write_folder(
        folder,
        [
            {
                "file_name": f"{k}.png",
                "text": f"{colors[k % 4]} dress {k}",
                "price": k,
                "id": k,
                "colour": (k, 2 * k, 99),
            }
            for k in range(n)
        ],
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


@pytest.mark.parametrize("kind", ["pil", "array", "bytes", "path", "str", "hit", "generated"])
def test_search_by_image(catalog: Catalog, tmp_path: Path, kind: str) -> None:
    fill(catalog)
    file = tmp_path / "query.png"
    picture("blue").save(file)
    image: Any = {
        "pil": lambda: picture("blue"),
        "array": lambda: np.asarray(picture("blue")),
        "bytes": file.read_bytes,
        "path": lambda: file,
        "str": lambda: str(file),
        "hit": lambda: catalog.get("blue"),
        "generated": lambda: catalog.generate("blue shoe", seed=9)[0],
    }[kind]()
    hit = catalog.search(image=image, limit=1)[0]
    assert hit.id == "blue"
    assert hit.score == pytest.approx(1, abs=1e-3)


def test_weights_decide_between_text_and_image(catalog: Catalog) -> None:
    fill(catalog)
    assert catalog.search("red", image=picture("blue"), weights=(0.9, 0.1))[0].id == "red"
    assert catalog.search("red", image=picture("blue"), weights=(0.1, 0.9))[0].id == "blue"


def test_pages_follow_one_another(catalog: Catalog) -> None:
    fill(catalog)
    everything = [hit.id for hit in catalog.search("red")]
    assert [hit.id for hit in catalog.search("red", limit=2, offset=1)] == everything[1:3]


def test_filter(catalog: Catalog) -> None:
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "The query is empty"),
        ({"text": "  "}, "text='  ': give a non-empty string"),
        ({"text": 7}, "text=7: give a non-empty string"),
        ({"text": "red", "limit": 0}, "limit=0"),
        ({"text": "red", "limit": 10_001}, "10,000"),
        ({"text": "red", "offset": -1}, "offset=-1"),
        ({"text": "red", "image": picture("red"), "weights": (1, -1)}, "weights"),
        ({"text": "red", "image": picture("red"), "weights": (0, 0)}, "weights"),
        ({"text": "red", "image": picture("red"), "weights": (float("nan"), 1)}, "weights"),
        ({"text": "red", "image": picture("red"), "weights": 0.5}, "weights"),
        ({"text": "red", "image": picture("red"), "weights": (1, 2, 3)}, "weights"),
    ],
)
def test_search_refuses(catalog: Catalog, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        catalog.search(**arguments)


def test_search_refuses_bad_filters_and_images(catalog: Catalog) -> None:
    with pytest.raises(FilterError, match="Valid operators"):
        catalog.search("red", where={"price": {"below": 3}})
    with pytest.raises(ImageError, match=r"nowhere\.png"):
        catalog.search(image="nowhere.png")


# ------------------------------------------------------------------------------------------------ adding


def test_ids(catalog: Catalog) -> None:
    assert catalog.add(picture("red"), ids="7") == ["7"]
    assert catalog.add(picture("blue"), ids=7) == [7]
    assert catalog.count() == 2
    red, blue = catalog.get("7"), catalog.get(7)
    assert red and blue and red.id == "7" and blue.id == 7 and red.sha256 != blue.sha256
    assert catalog.add([picture("green")] * 2, ids=np.arange(2)) == [0, 1]


def test_without_ids_adding_twice_is_harmless(catalog: Catalog) -> None:
    first = catalog.add([picture("red"), picture("blue")], ["one", "two"])
    assert catalog.add([picture("red"), picture("blue")], ["one", "two"]) == first
    assert catalog.count() == 2
    catalog.add(picture("red"), "another caption")
    assert catalog.count() == 3


def test_same_id_replaces_item_and_picture(catalog: Catalog) -> None:
    catalog.add(picture("red"), "a red dress", "dress", {"price": 1})
    old = catalog.get("dress")
    catalog.add(picture("blue"), "a blue dress", "dress", {"size": "M"})
    new = catalog.get("dress")
    assert old and new
    assert (new.text, new.payload, catalog.count()) == ("a blue dress", {"size": "M"}, 1)
    with pytest.raises(ImageError):
        old.load_image()
    assert catalog.search("blue")[0].score == pytest.approx(catalog.search(image=picture("blue"))[0].score, abs=0.1)


def test_payload_values(catalog: Catalog) -> None:
    import datetime

    given = {"n": np.int64(3), "x": np.float32(0.5), "day": datetime.date(2024, 5, 1), "list": (1, "a"), "none": None}
    catalog.add(picture("red"), ids="a", payloads={**given, "nested": {"größe": [True]}})
    hit = catalog.get("a")
    assert hit and hit.text is None
    expected = {"n": 3, "x": 0.5, "day": "2024-05-01", "list": [1, "a"], "none": None, "nested": {"größe": [True]}}
    assert hit.payload == expected


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"texts": ["only one"]}, "2 images but 1 texts"),
        ({"texts": "only one"}, "2 images but 1 texts"),
        ({"ids": ["a", "b", "c"]}, "2 images but 3 ids"),
        ({"payloads": {}}, "2 images but 1 payloads"),
        ({"texts": ["fine", "  "]}, "is empty"),
        ({"texts": ["fine", 3]}, "is empty"),
        ({"ids": ["a", "a"]}, "given 2 times"),
        ({"ids": ["a", ""]}, "not an id"),
        ({"ids": ["a", True]}, "not an id"),
        ({"ids": ["a", 1.5]}, "not an id"),
        ({"ids": ["a", 2**70]}, "64 bits"),
        ({"payloads": [{}, {"x": float("nan")}]}, "JSON"),
        ({"payloads": [{}, {"x": object()}]}, "JSON"),
        ({"payloads": [{}, {"x": {1: 2}}]}, "JSON"),
        ({"payloads": [{}, {"text": "x"}]}, '"text" cannot be a column'),
        ({"payloads": [{}, 3]}, "a payload is a dictionary"),
    ],
)
def test_add_refuses_and_keeps_everything(catalog: Catalog, arguments: dict[str, Any], says: str) -> None:
    fill(catalog)
    with pytest.raises(OptionError, match=says):
        catalog.add([picture("red", (9, 9)), picture("blue", (9, 9))], **arguments)
    assert catalog.count() == len(RGB)


def test_one_unusable_picture_stores_none(catalog: Catalog, tmp_path: Path) -> None:
    fill(catalog)
    truncated = tmp_path / "truncated.jpg"
    Image.effect_noise((200, 200), 90).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:3000])
    many = [picture((k, k, 200)) for k in range(40)]  # the bad one comes in the second batch
    for bad in (truncated, b"not an image", tmp_path / "missing.png", np.zeros((3, 3, 7)), object()):
        with pytest.raises(ImageError):
            catalog.add([*many, bad])
    with pytest.raises(StoreError, match="NaN"):
        catalog.add([*many, picture((13, 13, 13))])
    assert catalog.count() == len(RGB)


def test_an_image_error_names_the_file(catalog: Catalog, tmp_path: Path) -> None:
    (tmp_path / "fake.png").write_bytes(b"GIF8 no")
    with pytest.raises(ImageError, match=r"fake\.png: not an image"):
        catalog.add(tmp_path / "fake.png")


def test_hits_bring_their_captions_and_columns(catalog: Catalog, bundle: Path) -> None:
    fill(catalog)
    with Catalog(":memory:", bundle) as selection:
        assert selection.add(catalog.search("red", limit=2), payloads=[{"price": 99}, {}]) == ["red", "yellow"]
        hit = selection.get("red")
        assert hit and (hit.text, hit.payload) == ("a red dress", {"price": 99, "tags": []})
        assert selection.add(selection.search("red")) == ["red", "yellow"]
        assert selection.count() == 2


def test_a_file_that_changes_under_way_is_refused(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture("red").save(tmp_path / "a.png")
    changed = catalog._writer._changed

    def slow(items: Any, copy: bool) -> Any:
        picture("blue").save(tmp_path / "a.png")
        return changed(items, copy)

    monkeypatch.setattr(catalog._writer, "_changed", slow)
    with pytest.raises(ImageError, match="changed while"):
        catalog.add(tmp_path / "a.png")
    assert catalog.count() == 0


def test_delete(catalog: Catalog) -> None:
    fill(catalog)
    catalog.add(picture("red"), "the same picture", "twin")
    red = catalog.get("red")
    assert red
    assert catalog.delete(["red", "nobody"]) == 1
    assert red.load_image().size == (40, 30)  # the twin shows it still
    assert catalog.delete(catalog.search("red", where={"id": "twin"})) == 1
    with pytest.raises(ImageError):
        red.load_image()
    assert catalog.count() == len(RGB) - 1


def test_sixteen_threads(catalog: Catalog) -> None:
    fill(catalog)
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for step in range(6):
                name = f"{thread}-{step}"
                catalog.add(picture((10 * step + 20, 10 * thread + 20, 99)), ids=name, payloads={"thread": thread})
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
    assert catalog.count() == len(RGB) + 16 * 3


# ------------------------------------------------------------------------------------------------ folders


def test_add_folder(catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = catalog.add_folder(products(tmp_path / "products"), progress=True)
    assert (report.added, report.skipped, report.failed) == (70, 0, ())
    assert "70 added, 0 unchanged, 0 failed" in str(report)
    hit = catalog.get(5)
    assert hit and hit.payload == {"price": 5} and hit.text == "green dress 5"
    assert "70/70" in capsys.readouterr().err


def test_what_has_not_changed_is_passed_over(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products")
    catalog.add_folder(folder)
    assert catalog.add_folder(folder).added == 0
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace('"price": 3', '"price": 99')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    picture("red").save(folder / "50.png")
    report = catalog.add_folder(folder)
    assert (report.added, report.skipped) == (2, 68)
    changed = catalog.get(3)
    assert changed and changed.payload == {"price": 99}
    assert catalog.count() == 70


def test_bad_rows_are_reported(catalog: Catalog, tmp_path: Path) -> None:
    folder = products(tmp_path / "products", 40)
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:60])
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "1.png"}\n{"file_name": "../x.png", "text": "x"}\nnonsense\n')
        file.write('{"file_name": "2.png", "text": "x", "id": {"a": 1}}\n')
    report = catalog.add_folder(folder)
    assert report.added == catalog.count() == 39
    assert [bad.line for bad in report.failed] == [6, 41, 42, 43, 44]
    assert "5.png: damaged or truncated" in report.failed[0].reason
    with pytest.raises(DataError, match="line 6"):
        catalog.add_folder(folder, strict=True)
    assert catalog.count() == 39


def test_add_folder_refuses(catalog: Catalog, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        catalog.add_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"metadata\.jsonl"):
        catalog.add_folder(tmp_path / "empty")
    (tmp_path / "empty" / "metadata.jsonl").write_text("")
    assert catalog.add_folder(tmp_path / "empty").added == 0


# ------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("kind", ["jpg", "bytes", "pil", "array"])
def test_pictures_come_back(catalog: Catalog, tmp_path: Path, kind: str, copy: bool) -> None:
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


def test_a_reference_from_elsewhere_is_absolute(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "ä picture.png"
    picture("red").save(file)
    with Catalog(tmp_path / "deep" / "shop.catalog", bundle) as catalog:
        catalog.add(file, ids="a", copy=False)
        hit = catalog.get("a")
        assert hit and hit.uri == file.as_uri()
        assert hit.load_image().size == (40, 30)


def test_hits_work_in_another_process(catalog: Catalog) -> None:
    fill(catalog)
    hit = pickle.loads(pickle.dumps(catalog.get("red")))
    assert hit.load_image().getpixel((0, 0)) == RGB["red"]


def test_a_lost_thumbnail_is_made_again(catalog: Catalog) -> None:
    fill(catalog)
    shutil.rmtree(catalog.folder / "thumbnails")
    hit = catalog.get("red")
    assert hit and hit.thumbnail().size == (40, 30)


def test_results_are_frozen_and_show_themselves(catalog: Catalog) -> None:
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


def test_generation_is_ranked(catalog: Catalog) -> None:
    fill(catalog)
    generation = catalog.generate("red dress", negative_prompt="blue", n=4, seed=5, steps=7)
    assert [picture.seed for picture in generation] == [8, 7, 6, 5]
    assert sorted([p.score for p in generation], reverse=True) == [p.score for p in generation]
    best = generation[0]
    assert best.nearest and best.nearest.id == "red"
    settings = (best.prompt, best.negative_prompt, best.seed, best.steps, best.guidance_scale, best.sampler)
    assert settings == ("red dress", "blue", 8, 7, 4.0, "ddim")
    assert best.bundle == "aaaa"
    assert len(generation[:2]) == 2


def test_a_random_seed_is_told(catalog: Catalog) -> None:
    assert catalog.generate("red")[0].seed != catalog.generate("red")[0].seed


def test_generated_pictures_are_marked(catalog: Catalog) -> None:
    generation = catalog.generate("red dress", n=3, seed=5)
    ids = catalog.add(generation)
    assert len(ids) == catalog.count({"generated": True}) == 3
    hit = catalog.get(ids[0])
    assert hit and hit.text == "red dress"
    assert hit.payload["seed"] == 7 and hit.payload["prompt"] == "red dress"
    assert np.array_equal(np.asarray(hit.load_image()), np.asarray(generation[0].image))
    catalog.add(generation[1], "a caption of its own", "mine", {"price": 3})
    mine = catalog.get("mine")
    assert mine and mine.text == "a caption of its own" and mine.payload["price"] == 3


def test_an_empty_prompt_is_refused(catalog: Catalog) -> None:
    with pytest.raises(OptionError, match="give a text that is not empty"):
        catalog.generate(" ")


# ------------------------------------------------------------------------------------------------ the folder


def test_reopening(tmp_path: Path, bundle: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
        catalog.optimize()
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.search("red")[0].id == "red"
        assert catalog.search("red")[0].load_image().size == (40, 30)


@pytest.mark.parametrize("inside", [True, False])
def test_moving_catalog_and_bundle_together(tmp_path: Path, inside: bool) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    place = Path("shop.catalog/bundle") if inside else Path("bundle")
    make_bundle(tmp_path / "bundle")
    old.mkdir()
    if not inside:
        shutil.move(tmp_path / "bundle", old / "bundle")
    with Catalog(old / "shop.catalog", tmp_path / "bundle" if inside else old / "bundle") as catalog:
        fill(catalog)
        picture("red").save(old / "beside.png")
        catalog.add(old / "beside.png", ids="beside", copy=False)
    if inside:
        shutil.move(tmp_path / "bundle", old / place)
        Catalog(old / "shop.catalog", old / place).close()
    shutil.move(old, new)
    with Catalog(new / "shop.catalog") as catalog:
        hit = catalog.search("red")[0]
        assert hit.id in ("red", "beside") and hit.load_image().size == (40, 30)
        assert catalog.bundle.path == new / place
        beside = catalog.get("beside")
        assert beside and beside.load_image().size == (40, 30)


def test_moving_the_catalog_alone(tmp_path: Path, bundle: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(tmp_path / "shop.catalog", tmp_path / "far" / "away")
    for _ in range(2):
        with Catalog(tmp_path / "far" / "away" / "shop.catalog") as catalog:
            assert catalog.search("red")[0].load_image().size == (40, 30)


def test_what_needs_no_model_works_without_the_bundle(tmp_path: Path, bundle: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
    bundle.rename(tmp_path / "elsewhere")
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.count() == catalog.info()["items"] == 4
        with pytest.raises(BundleError, match=r"is not at .*bundle"):
            catalog.search("red")
    with Catalog(tmp_path / "shop.catalog", tmp_path / "elsewhere") as catalog:
        assert catalog.search("red")[0].id == "red"
    with Catalog(tmp_path / "shop.catalog") as catalog:  # and it has remembered
        assert catalog.search("red")[0].id == "red"


@pytest.mark.parametrize("dim", [4, 8])
def test_another_bundle_is_refused(tmp_path: Path, bundle: Path, dim: int) -> None:
    with Catalog(tmp_path / "shop.catalog", bundle) as catalog:
        fill(catalog)
    other = make_bundle(tmp_path / "other", "bbbb", dim)
    with pytest.raises(StoreError, match=r"another one.*catalog\.reindex") as refused:
        Catalog(tmp_path / "shop.catalog", other)
    assert ("4 dimensions, not 8" in str(refused.value)) == (dim == 8)
    make_bundle(bundle, "cccc")  # changed where it lies
    with Catalog(tmp_path / "shop.catalog") as catalog:
        with pytest.raises(StoreError, match="another one"):
            catalog.search("red")
        assert catalog.count() == 4


def test_reindex(tmp_path: Path, catalog: Catalog) -> None:
    fill(catalog)
    other = make_bundle(tmp_path / "other", "bbbb", 8)
    assert catalog.reindex(other) == 4
    assert catalog.search("red")[0].id == "red"
    assert catalog.reindex(other) == 0
    catalog.close()
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.search("red")[0].id == "red"
        assert catalog.info()["bundle"]["dim"] == 8
        assert sorted(path.name for path in catalog.folder.glob("vectors*")) == ["vectors-bbbb"]


def test_a_swap_that_cannot_be_written_loses_nothing(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(catalog)
    other = make_bundle(tmp_path / "other", "bbbb", 8)

    def full(*arguments: Any) -> None:
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(CatalogFile, "write", full)
        for _ in range(2):
            with pytest.raises(StoreError, match="the disk is full"):
                catalog.reindex(other)
    assert catalog.search("red")[0].id == "red"
    catalog.close()
    with Catalog(tmp_path / "shop.catalog") as again:
        assert again.count() == 4 and again.info()["bundle"]["dim"] != 8
        assert again.reindex(other) == 4


def test_reindex_goes_on_where_it_stopped(tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog.add_folder(products(tmp_path / "products"))
    other = make_bundle(tmp_path / "other", "bbbb", 8)
    encoded: list[int] = []
    encode = ColorEncoder.encode_pixels

    def interrupted(self: ColorEncoder, pixels: np.ndarray) -> np.ndarray:
        if len(encoded) == 1:
            encoded.append(0)
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(ColorEncoder, "encode_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        catalog.reindex(other)
    assert catalog.get(3) and catalog.count() == 70
    catalog.delete(3)
    catalog.close()
    with Catalog(tmp_path / "shop.catalog") as catalog:
        assert catalog.reindex(other) == 69
        assert catalog.count() == 69 and catalog.get(3) is None
    assert sum(encoded) in (69, 70)


def test_in_use(tmp_path: Path, catalog: Catalog) -> None:
    with pytest.raises(StoreError, match=r"shop\.catalog is in use"):
        Catalog(tmp_path / "shop.catalog")


def test_in_use_by_another_process(tmp_path: Path, catalog: Catalog) -> None:
    script = "import sys; from unidiff_sdk import Catalog; Catalog(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", script, str(catalog.folder)], capture_output=True, text=True, check=False
    )
    assert "StoreError" in run.stderr and "in use" in run.stderr


def test_closed(catalog: Catalog) -> None:
    catalog.close()
    catalog.close()
    calls: list[Callable[[], Any]] = [
        catalog.count,
        lambda: catalog.search("red"),
        lambda: catalog.add(picture("red")),
        lambda: catalog.get("a"),
        lambda: catalog.delete("a"),
        lambda: catalog.generate("red"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="closed"):
            call()


def test_memory_leaves_nothing(bundle: Path) -> None:
    with Catalog(bundle=bundle) as catalog:
        fill(catalog)
        folder = catalog.folder
        assert folder.is_dir()
    assert not folder.exists()
    forgotten = Catalog(bundle=bundle)
    fill(forgotten)
    forgotten.search("red")
    folder = forgotten.folder
    del forgotten
    assert not folder.exists()


def test_not_a_catalog(tmp_path: Path, bundle: Path) -> None:
    with pytest.raises(StoreError, match="no catalog"):
        Catalog(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(StoreError, match="is not a catalog"):
        Catalog(bundle, bundle)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is not a catalog"):
        Catalog(tmp_path / "file", bundle)
    with pytest.raises(BundleError):
        Catalog(tmp_path / "new", tmp_path / "missing")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "unidiff-catalog", "schema_version": 1}', "\0"])
def test_damaged_catalog_file(tmp_path: Path, bundle: Path, content: str) -> None:
    Catalog(tmp_path / "shop.catalog", bundle).close()
    (tmp_path / "shop.catalog" / "catalog.json").write_text(content)
    with pytest.raises(StoreError, match="damaged"):
        Catalog(tmp_path / "shop.catalog")


def test_catalog_of_a_later_version(tmp_path: Path, bundle: Path) -> None:
    Catalog(tmp_path / "shop.catalog", bundle).close()
    file = tmp_path / "shop.catalog" / "catalog.json"
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(StoreError, match="Upgrade"):
        Catalog(tmp_path / "shop.catalog")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be written"):
        Catalog(tmp_path / "locked" / "shop.catalog", bundle)


# ------------------------------------------------------------------------------------------------ synthetic models


def test_real_pictures_with_a_synthetic_model_warn_once(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "drawn", synthetic=True)
    with Catalog(bundle=bundle) as catalog:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            catalog.add(picture("red"), payloads={"catalog": "fashion-man"})
            catalog.add(catalog.generate("red", seed=0))
        with pytest.warns(UserWarning, match="synthetic products only"):
            catalog.add(picture("blue"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            catalog.add(picture("green"))


# ------------------------------------------------------------------------------------------------ a server


def test_the_server_path(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qdrant_client

    local = qdrant_client.QdrantClient(":memory:")
    monkeypatch.setattr(local, "close", lambda: None)
    monkeypatch.setattr(qdrant_client, "QdrantClient", lambda **_: local)
    with Catalog("http://qdrant:6333", bundle, images=tmp_path / "pictures") as catalog:
        fill(catalog)
        catalog.delete("yellow")
    with Catalog("http://qdrant:6333", images=tmp_path / "pictures") as catalog:
        hit = catalog.search("red", where={"price": {"lt": 15}})[0]
        assert hit.id == "red" and hit.load_image().size == (40, 30)
        assert catalog.count() == 3
    with pytest.raises(StoreError, match="another bundle"):
        Catalog("http://qdrant:6333", make_bundle(tmp_path / "other", "bbbb"), images=tmp_path / "more")
    with pytest.raises(OptionError, match="images="):
        Catalog("http://qdrant:6333", bundle)


def test_reindexing_on_a_server(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qdrant_client

    local = qdrant_client.QdrantClient(":memory:")
    monkeypatch.setattr(local, "close", lambda: None)
    monkeypatch.setattr(qdrant_client, "QdrantClient", lambda **_: local)
    other = make_bundle(tmp_path / "other", "bbbb", 8)
    with Catalog("http://qdrant:6333", bundle, images=tmp_path / "pictures", collection="shop") as catalog:
        fill(catalog)
        with Catalog("http://qdrant:6333", bundle, images=tmp_path / "pictures", collection="shop") as elsewhere:
            assert catalog.reindex(other) == 4
            assert catalog.search("red")[0].id == "red" and catalog.info()["bundle"]["dim"] == 8
            catalog.delete("red")
            assert elsewhere.search("red")[0].id == "red"  # with the bundle and the collection that it was opened with
    with Catalog("http://qdrant:6333", images=tmp_path / "pictures", collection="shop") as catalog:
        assert catalog.info()["bundle"]["fingerprint"] == "bbbb" and catalog.count() == 3
    assert {found.name for found in local.get_collections().collections} == {"shop", "shop-bbbb"}
