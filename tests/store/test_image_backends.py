"""The contract of an image store, over a folder and each kind of object storage; and the errors of object storage.

`make test-objects` also runs it over a real S3 protocol: moto's server on loopback.
"""

from __future__ import annotations

import errno
import hashlib
import io
import multiprocessing
import os
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import object_stores
from support.object_stores import FaultyFileSystem

from unidiff_sdk import Catalog, ForbiddenError, ImageError, ObjectStorage, OptionError, StoredImageError, StoreError
from unidiff_sdk.store.images import THUMBNAIL_SIZE, ImageStore, ItemImage, open_images
from unidiff_sdk.store.images.file_cache import FileCache
from unidiff_sdk.store.images.object_storage import ObjectFolder, image_place

object_stores.register()


@pytest.fixture(params=["folder", "memory", "plain", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the images are. "" is a folder."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    prefix = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:8]
    return {
        "folder": "",
        "memory": f"memory://{prefix}",
        "plain": f"plain://{tmp_path}/plain",
        "s3": f"s3://{object_stores.BUCKET}/{prefix}",
    }[str(request.param)]


def open_store(url: str, folder: Path, cache_size: int = 1 << 30) -> ImageStore:
    """An image store as another machine would open it: with its own cache."""
    if not url:
        return open_images(folder.parent / "shop", None)
    return open_images(folder, ObjectStorage(url, cache=folder / "cache", cache_size=cache_size))


def photo(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (300, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ the contract


def test_copy_is_read_elsewhere_byte_for_byte(url: str, tmp_path: Path) -> None:
    data = photo()
    uri = open_store(url, tmp_path / "a").add(ItemImage(data))
    sha256 = hashlib.sha256(data).hexdigest()
    assert uri == f"images/{sha256[:2]}/{sha256}.jpg"
    other = open_store(url, tmp_path / "b")
    assert other.read(uri) == data == other.path(uri).read_bytes()
    assert other.has(uri) and other.add(ItemImage(data)) == uri
    assert np.array_equal(np.asarray(other.load(uri)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_array_is_stored_without_loss(url: str, tmp_path: Path) -> None:
    array = np.random.default_rng(1).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    uri = open_store(url, tmp_path / "a").add(ItemImage(array))
    assert open_store(url, tmp_path / "b").load(uri).tobytes() == array.tobytes()


def test_thumbnail_has_its_size_and_is_made_again(url: str, tmp_path: Path) -> None:
    store, image = open_store(url, tmp_path / "a"), ItemImage(photo())
    uri = store.add(image)
    content = open_store(url, tmp_path / "b").thumbnail(image.sha256, uri)
    assert Image.open(io.BytesIO(content)).size == (round(THUMBNAIL_SIZE * 200 / 300), THUMBNAIL_SIZE)
    store.delete(f"thumbnails/{image.sha256[:2]}/{image.sha256}.webp")
    assert open_store(url, tmp_path / "c").thumbnail(image.sha256, uri) == content


def test_removed_image_is_gone_everywhere(url: str, tmp_path: Path) -> None:
    store, image, kept = open_store(url, tmp_path / "a"), ItemImage(photo()), ItemImage(photo(1))
    uri, kept_uri = store.add(image), store.add(kept)
    store.read(uri)
    store.remove(image.sha256, uri)
    assert not store.has(uri) and store.has(kept_uri)
    with pytest.raises(StoredImageError, match=r"missing|no such file"):
        store.read(uri)
    assert {file.sha256 for file in store.stored_files()} == {kept.sha256}
    assert store.add(ItemImage(photo())) == uri and store.has(uri), "an image can be added again at once"


def test_image_deleted_as_an_orphan_can_be_added_again_at_once(url: str, tmp_path: Path) -> None:
    store, image = open_store(url, tmp_path / "a"), ItemImage(photo())
    uri = store.add(image)
    for file in list(store.stored_files()):
        store.delete(file.name)
    assert store.add(image) == uri and store.has(uri)


def test_stored_files_are_listed_with_size_and_time(url: str, tmp_path: Path) -> None:
    store, data = open_store(url, tmp_path / "a"), photo()
    uri = store.add(ItemImage(data))
    found = {file.name: file for file in store.stored_files()}
    assert found.keys() == {uri, uri.replace("images", "thumbnails").replace(".jpg", ".webp")}
    assert found[uri].size == len(data)
    assert abs(found[uri].modified - (tmp_path / ".").stat().st_mtime) < 600


def test_clock_is_that_of_the_storage_and_leaves_nothing(url: str, tmp_path: Path) -> None:
    store = open_store(url, tmp_path / "a")
    first = store.now()
    store.add(ItemImage(photo()))
    (modified,) = [file.modified for file in store.stored_files() if file.name.startswith("images")]
    assert first - 2 <= modified <= store.now() + 2
    assert len(list(store.stored_files())) == 2
    if url:
        assert len(list(ObjectFolder(ObjectStorage(url)).list(""))) == 2


@pytest.mark.parametrize("uri", ["images/../../victim.png", "../victim.png", "file:///etc/hostname", "catalog.json"])
def test_foreign_uri_is_not_read(url: str, tmp_path: Path, uri: str) -> None:
    store = open_store(url, tmp_path / "a")
    with pytest.raises(ImageError, match=r"leads out|no such file|not a regular file"):
        store.read(uri)
    store.remove("../../victim", uri)


def test_damaged_image_is_reported_and_its_copy_replaced(url: str, tmp_path: Path) -> None:
    store, data = open_store(url, tmp_path / "a"), photo()
    uri = store.add(ItemImage(data))
    if not url:
        store.path(uri).write_bytes(data[:100])
    else:
        store.read(uri)
        (tmp_path / "a" / "cache" / uri).write_bytes(data[:100])
        assert store.load(uri).size == (200, 300), "a damaged copy is fetched again"
        ObjectFolder(ObjectStorage(url)).write(uri, data[:100])
    with pytest.raises(StoredImageError):
        open_store(url, tmp_path / "b").load(uri)


def test_file_is_created_once(url: str) -> None:
    if not url:
        pytest.skip("a folder has locks")
    folder = ObjectFolder(ObjectStorage(url))
    assert folder.create("catalog.json", b"first") is True
    assert folder.create("catalog.json", b"second") is False
    assert folder.read("catalog.json") == b"first" and folder.read("none.json") is None


# ------------------------------------------------------------------------------------------------ object storage


def test_unfinished_upload_is_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(files: object, source: str, target: str, **_: object) -> None:
        raise KeyboardInterrupt

    url, data = f"plain://{tmp_path}/plain", photo()
    uri = open_store(url, tmp_path / "a").add(ItemImage(photo(1)))
    with monkeypatch.context() as patch:
        patch.setattr(object_stores.PlainFileSystem, "mv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_store(url, tmp_path / "a").add(ItemImage(data))
    store = open_store(url, tmp_path / "b")
    assert {file.name for file in store.stored_files() if file.name.startswith("images")} == {uri}
    assert store.read(store.add(ItemImage(data))) == data


def test_requests_of_one_image(tmp_path: Path) -> None:
    with FaultyFileSystem.fresh() as files:
        store = open_store("abfs://shop", tmp_path)
        image = ItemImage(photo())
        uri = store.add(image)
        assert [method for method, _ in files.requests] == ["HEAD", "PUT", "PUT"]
        store.add(image)  # as the writer does before it stores the item
        for _ in range(3):
            store.read(uri)
        assert [method for method, _ in files.requests] == ["HEAD", "PUT", "PUT", "GET"]


def test_without_a_cache_folder_images_are_still_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file in the place of the folder")
    with FaultyFileSystem.fresh():
        store = open_images(tmp_path, ObjectStorage("abfs://shop", cache=tmp_path / "a"))
        assert store.read(store.add(ItemImage(photo()))) == photo()


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (PermissionError("Forbidden"), ForbiddenError, "no permission to read"),
        (ConnectionError("Connection refused\nsecond line"), StoreError, "cannot read .Connection refused.*network"),
        (RuntimeError("botocore says\nso"), StoreError, "cannot read .botocore says"),
        (TimeoutError(), StoreError, "TimeoutError"),
    ],
    ids=["permission", "network", "unknown", "timeout"],
)
def test_failure_of_the_storage_is_one_line(
    tmp_path: Path, error: Exception, kind: type[Exception], message: str
) -> None:
    def fail(method: str, path: str) -> None:
        raise error

    with FaultyFileSystem.fresh() as files:
        store, other = open_store("abfs://shop", tmp_path / "a"), open_store("abfs://shop", tmp_path / "b")
        uri = store.add(ItemImage(photo()))
        files.fault = fail
        with pytest.raises(kind, match=message) as raised:
            other.read(uri)
        assert "\n" not in str(raised.value) and "abfs://shop/images" in str(raised.value)
        files.fault = None
        assert other.read(uri) == photo(), "nothing is lost"


def test_thumbnail_without_permission_to_write(tmp_path: Path) -> None:
    def read_only(method: str, path: str) -> None:
        if method == "PUT":
            raise PermissionError("Forbidden")

    with FaultyFileSystem.fresh() as files:
        store, image = open_store("abfs://shop", tmp_path), ItemImage(photo())
        uri = store.add(image)
        store.delete(f"thumbnails/{image.sha256[:2]}/{image.sha256}.webp")
        files.fault = read_only
        assert Image.open(io.BytesIO(store.thumbnail(image.sha256, uri))).height == THUMBNAIL_SIZE
        with pytest.raises(ForbiddenError, match="no permission to write"):
            store.add(ItemImage(photo(1)))


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("nonsense://bucket", OptionError, "Protocol not known: nonsense"),
        ("s3://key:secret@bucket/shop", OptionError, r"user name.*options="),
        ("s3://bucket/shop?token=secret", OptionError, r"query"),
        ("s3://", OptionError, "not the URL of object storage"),
        ("shop", OptionError, "not the URL of object storage"),
    ],
)
def test_invalid_url_is_refused(tmp_path: Path, url: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as raised:
        open_store(url, tmp_path)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("abfs", "adlfs")])
def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str) -> None:
    import fsspec

    def missing(*_: object, **__: object) -> None:
        raise ImportError(f"Install {extra} to access {scheme}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    expected = f"unidiff-sdk[{extra}]" if extra != "adlfs" else "Install adlfs"
    with pytest.raises(StoreError, match="is not installed") as raised:
        open_store(f"{scheme}://bucket/shop", tmp_path)
    assert expected in str(raised.value)


def test_reference_to_a_file_of_this_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(photo())
    with pytest.raises(OptionError, match="Omit copy=False"):
        open_store("memory://shop", tmp_path).add(ItemImage(tmp_path / "photo.jpg"), copy=False)


@pytest.mark.parametrize("url", ["", "memory://shop"])
def test_storage_that_cannot_sign_says_so(tmp_path: Path, url: str) -> None:
    store = open_store(url, tmp_path / "a")
    with pytest.raises(StoreError, match=r"signed URLs.*image_bytes\(\)"):
        store.signed_url(store.add(ItemImage(photo())), 60)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "1"])
def test_invalid_size_of_the_cache_is_refused(size: object) -> None:
    with pytest.raises(OptionError, match="cache_size"):
        ObjectStorage("memory://shop", cache_size=size)  # type: ignore[arg-type]


def test_options_are_not_shown() -> None:
    assert "secret" not in repr(ObjectStorage("memory://shop", options={"key": "secret"}))


def test_file_url_is_a_folder() -> None:
    assert image_place("file:///data/a%20b") == Path("/data/a b") == image_place("/data/a b")
    assert isinstance(image_place("memory://a"), ObjectStorage)


# ------------------------------------------------------------------------------------------------ the cache


def test_cache_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", max_size=1000)
    for number in range(9):
        cache.put(f"old/{number}", bytes(100))
        os.utime(tmp_path / "cache" / "old" / str(number), ns=(number, number))
    assert cache.get("old/0") is not None  # used now
    for number in range(5):
        cache.put(f"new/{number}", bytes(100))
    kept = {path.relative_to(tmp_path / "cache").as_posix() for path in (tmp_path / "cache").rglob("[0-9]")}
    assert {"old/0", "old/8", "new/4"} <= kept and not {"old/1", "old/2", "old/3"} & kept
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("[0-9]")) <= 1000


def test_cache_deletes_what_killed_processes_left(tmp_path: Path) -> None:
    left = tmp_path / "old" / ".0123456789abcdef.part"
    left.parent.mkdir()
    left.write_bytes(bytes(5000))
    FileCache(tmp_path, max_size=1000).put("new/1", bytes(100))
    assert not left.exists() and (tmp_path / "new" / "1").exists()


def test_cache_on_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    cache = FileCache(tmp_path, max_size=1000)
    for number in range(30):
        cache.put(f"new/{number}", bytes(100))
    assert sum(path.stat().st_size for path in (tmp_path / "new").iterdir()) <= 1000


def fill(folder: Path, process: int) -> None:
    cache = FileCache(folder, max_size=20_000)
    for number in range(200):
        name = f"{number % 50}"
        path = cache.get(name)
        if path is None:
            cache.put(name, bytes([number % 50]) * 1000)
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            continue
        assert content == bytes([number % 50]) * 1000, f"process {process} read half of a file"


def test_cache_is_shared_by_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=fill, args=(tmp_path, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size <= 20_000 * (1 + 3 / 16) + 3_000


# ------------------------------------------------------------------------------------------------ S3


def test_signed_url_is_readable_without_credentials(s3: str, tmp_path: Path) -> None:
    store = open_store(f"s3://{object_stores.BUCKET}/signed", tmp_path)
    signed = store.signed_url(store.add(ItemImage(photo())), expires=60)
    assert signed.startswith(s3) and "Signature=" in signed
    assert urllib.request.urlopen(signed).read() == photo()


def test_catalog_keeps_its_images_in_s3(s3: str, tmp_path: Path) -> None:
    from support.toy_bundle import make_toy_bundle

    images = f"s3://{object_stores.BUCKET}/catalog"
    with Catalog(tmp_path / "shop", make_toy_bundle(tmp_path / "bundle"), images=images) as catalog:
        catalog.add([photo(seed) for seed in range(3)], ids=[0, 1, 2])
        hit = catalog.search(image=photo(1), limit=1)[0]
        assert hit.id == 1 and hit.image_bytes() == photo(1)
        assert urllib.request.urlopen(hit.image_url(expires=60)).read() == photo(1)
        assert catalog.delete(0) == 1
        report = catalog.check()
        assert not (report.missing_images or report.orphaned_images or report.remaining)
    with pytest.raises(StoreError, match="another catalog"):
        Catalog(tmp_path / "other", tmp_path / "bundle", images=images)


def test_wrong_bucket_and_stopped_server_are_one_line(s3: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"s3://nowhere/shop/.*Check the bucket") as raised:
        open_store("s3://nowhere/shop", tmp_path).add(ItemImage(photo()))
    assert "\n" not in str(raised.value)
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 1}}}
    down = open_images(tmp_path, ObjectStorage(f"s3://{object_stores.BUCKET}/shop", options=options))
    with pytest.raises(StoreError, match="Check the network") as raised:
        down.read("images/ab/" + "ab" * 32 + ".png")
    assert "\n" not in str(raised.value)
