"""Loading images from every kind of source, and preprocessing, compared with transformers."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from unidiff_sdk._internal.images import load_image
from unidiff_sdk.errors import ImageError
from unidiff_sdk.inference.preprocessing import preprocess

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_every_source_gives_the_same_image(tmp_path: Path) -> None:
    image = noise(20, 10)
    data = encoded(image, "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(data)
    pixels = np.asarray(image)
    sources = [image, data, bytearray(data), memoryview(data), path, str(path), pixels, pixels[:, ::-1][:, ::-1]]
    sources += [pixels / 255, pixels.astype(np.uint16) * 257]
    for source in sources:
        loaded = load_image(source)
        assert loaded.mode == "RGB" and loaded.size == (20, 10)
        np.testing.assert_array_equal(np.asarray(loaded), pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_arrays_have_one_to_four_channels(channels: int) -> None:
    array = np.full((4, 6, channels), 100, np.uint8)
    if channels in (2, 4):
        array[..., -1] = 0  # fully transparent: white
    expected = 255 if channels in (2, 4) else 100
    np.testing.assert_array_equal(np.asarray(load_image(array)), np.full((4, 6, 3), expected))


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # display after a quarter turn clockwise
    upright = load_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (10, 30)
    assert upright.getpixel((5, 3))[2] > 200 and upright.getpixel((5, 26))[0] > 200


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_exif_is_ignored() -> None:
    assert load_image(encoded(noise(8, 8), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (8, 8)


def test_transparency_is_composited_over_white() -> None:
    rgba = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    rgba.putpixel((0, 0), (10, 20, 30, 255))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((0, 0), 0)
    for data in (encoded(rgba, "PNG"), encoded(rgba, "WEBP", lossless=True), encoded(palette, "PNG", transparency=1)):
        loaded = load_image(data)
        assert loaded.getpixel((0, 0)) == (10, 20, 30) and loaded.getpixel((3, 3)) == (255, 255, 255)
    half = load_image(Image.new("LA", (1, 1), (0, 128)))
    assert half.getpixel((0, 0)) == (127, 127, 127)


def test_16_bit_and_other_modes_become_8_bit_rgb() -> None:
    deep = Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    for source in (deep, encoded(deep, "PNG"), encoded(deep, "TIFF"), deep.convert("I")):
        np.testing.assert_array_equal(np.asarray(load_image(source))[0, :, 0], [0, 100, 255])
    assert load_image(Image.new("1", (2, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("F", (2, 2), 1.0)).getpixel((0, 0)) == (255, 255, 255)
    cmyk = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95))
    red, green, blue = cmyk.getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    red, green, blue = load_image(data).getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (png_claiming(9000, 9000), "9000 x 9000 pixels exceed the limit of 64,000,000"),
        (png_claiming(60000, 60000), "too large to decode safely"),
        (png_claiming(64, 64), "damaged or truncated"),
        (encoded(noise(64, 64), "PNG")[:-500], "damaged or truncated"),
        (encoded(noise(64, 64), "JPEG")[:700], "damaged or truncated"),
        (b"", "image data of 0 bytes: not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in a supported format"),
        (b"not an image", "not an image in a supported format"),
        ("no/such/file.png", "there is no such file"),
        (Path("."), "is a folder"),
        (3, "Cannot read an image from int"),
        (Image.new("RGB", (0, 5)), "has no pixels"),
        (Image.new("RGB", (60_000, 1)), "exceed the aspect ratio of 200:1"),
        (np.zeros((0, 4, 3), np.uint8), "is not an image"),
        (np.zeros((4, 4, 5), np.uint8), r"\[4, 4, 5\] is not an image"),
        (np.zeros(4, np.uint8), "is not an image"),
        (np.full((4, 4), np.nan), r"Scale them to \[0, 1\]"),
        (np.full((4, 4), 200.0), r"Scale them to \[0, 1\]"),
        (np.zeros((4, 4), np.int64), "int64 are ambiguous"),
        (Image.new("I", (2, 2), 70000), "Scale them to"),
        (np.zeros((4, 4), object), "ambiguous"),
    ],
)
def test_invalid_images_raise(source: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_image(source)


def test_pixel_limit_can_be_changed() -> None:
    with pytest.raises(ImageError, match="exceed the limit of 50"):
        load_image(noise(10, 10), max_pixels=50)
    assert load_image(noise(10, 10), max_pixels=100).size == (10, 10)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_file_gives_an_image_or_an_image_error(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]))
    broken = bytearray(encoded(noise(16, 16), kind))
    for position in data.draw(st.lists(st.integers(0, len(broken) - 1), min_size=1, max_size=6)):
        broken[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageError):
        assert load_image(bytes(broken), max_pixels=1_000_000).mode == "RGB"


@settings(max_examples=50, deadline=None)
@given(
    width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([32, 64, 97]), seed=st.integers(0, 99)
)
def test_preprocess_equals_transformers(width: int, height: int, size: int, seed: int) -> None:
    transformers = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=MEAN, image_std=STD
    )
    image = noise(width, height, seed)
    expected = np.asarray(processor(image)["pixel_values"][0])
    actual = preprocess(image, size, MEAN, STD)
    assert actual.shape == (3, size, size) and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(width=st.integers(1, 300), height=st.integers(1, 300), size=st.sampled_from([32, 64, 97]))
def test_padding_keeps_the_whole_image_and_its_aspect_ratio(width: int, height: int, size: int) -> None:
    """A black image on white: the black box has the size of `ImageOps.contain` and is centered."""
    black = Image.new("RGB", (width, height), "black")
    pixels = preprocess(black, size, np.zeros(3, np.float32), np.ones(3, np.float32), "pad")
    assert pixels.shape == (3, size, size) and set(np.unique(pixels)) <= {0.0, 1.0}
    for axis, expected in enumerate(ImageOps.contain(black, (size, size)).size):
        inside = np.flatnonzero((pixels[0] == 0).any(axis=axis))
        assert abs(len(inside) - max(1, expected)) <= 1
        assert abs(inside[0] - (size - 1 - inside[-1])) <= 1


# ------------------------------------------------------------------------------------------------ cost


def peak_memory(act: Any) -> int:
    """The peak of memory in bytes that a call takes in a process of its own, beyond what the process has before."""
    code = (
        "from pathlib import Path; from unidiff_sdk._internal.images import load_image; "
        # Not ru_maxrss, which a new program inherits from the one that started it.
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]); before = peak(); "
        f"{act}; print((peak() - before) * 1024)"
    )
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_a_large_image_in_a_few_bytes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "blank.webp"
    Image.new("RGB", (8000, 7900)).save(file, lossless=True)
    assert file.stat().st_size < 4000
    with pytest.raises(ImageError, match="pixels a byte"):
        load_image(file)
    Image.new("RGB", (3900, 3900)).save(file, lossless=True)
    assert load_image(file).size == (3900, 3900)
    Image.new("RGB", (7000, 7000), "red").save(tmp_path / "blank.png")  # an honest file of one color
    assert load_image(tmp_path / "blank.png").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["I;16", "LA"])
def test_a_large_image_takes_a_bounded_amount_of_memory(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (5000, 5000)).save(tmp_path / "large.png")
    assert peak_memory(f"load_image({str(tmp_path / 'large.png')!r})") < 13 * 25_000_000


@pytest.mark.parametrize("format", ["WEBP", "AVIF", "TIFF", "GIF", "BMP"])
def test_other_formats_take_a_bounded_amount_of_memory(tmp_path: Path, format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    Image.fromarray(noise.repeat(20, 0).repeat(20, 1)).save(tmp_path / "image", format)
    assert peak_memory(f"load_image({str(tmp_path / 'image')!r})") < 22 * 4_000_000


def test_a_tiff_with_tiles_far_larger_than_the_image_is_refused(tmp_path: Path) -> None:
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 1, 277: 1, 322: 32768, 323: 32768, 324: 200, 325: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = tmp_path / "tiles.tif"
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + zlib.compress(bytes(1 << 20)))
    with pytest.raises(ImageError, match=r"tiles of 1,073,741,824 pixels for an image of 10,000"):
        load_image(file)


def test_a_jpeg_of_very_many_exif_segments_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    data = buffer.getvalue()
    segment = b"\xff\xe1" + struct.pack(">H", 1002) + b"Exif\0\0" + bytes(994)
    assert load_image(data[:2] + segment * 2 + data[2:]).size == (8, 8)
    with pytest.raises(ImageError, match="with 300 EXIF segments"):
        load_image(data[:2] + segment * 300 + data[2:])


def test_a_jpeg_of_very_many_scans_is_refused() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert load_image(data).size == (64, 64)
    start = data.index(b"\xff\xda")
    scan = data[start : data.index(b"\xff\xda", start + 2)]
    with pytest.raises(ImageError, match=r"progressive JPEG of 1,\d\d\d scans"):
        load_image(data[:start] + scan * 1000 + data[start:])


def test_16_bit_pixels_are_rounded_to_the_nearest() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = np.asarray(load_image(values))[..., 0]
    assert np.array_equal(image, np.rint(values / 257).astype(np.uint8))


def test_transparency_is_composited_over_white_across_strips() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert np.array_equal(np.asarray(load_image(image)), np.asarray(expected))


def test_only_regular_files_of_limited_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 64 << 30)
    for path in (tmp_path / "fifo.png", Path("/dev/zero")):
        with pytest.raises(ImageError):
            load_image(path)
    with pytest.raises(ImageError, match="at most 268,435,456 are allowed"):
        load_image(tmp_path / "sparse.png")
