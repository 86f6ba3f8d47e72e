"""Provenance of a generated image, in its file: that a model generated it, and how to generate it again.

PNG and WebP files carry an XMP packet. It holds the IPTC property by which search engines and shops tell generated
images from photographs (`Iptc4xmpExt:DigitalSourceType`, IPTC Photo Metadata Standard 2023.1), and the recipe as JSON.
The files are lossless, so that an image generated again can be compared bit by bit.
"""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from unidiff_sdk._internal.files import write_atomically
from unidiff_sdk._internal.json_values import parse_json
from unidiff_sdk.errors import ImageError, OptionError

__all__ = ["Recipe", "encode", "read_recipe", "save"]

_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_PARTLY_GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
><rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:unidiff="urn:unidiff:recipe:1"
 Iptc4xmpExt:DigitalSourceType="{source}" xmp:CreatorTool="UniDiff SDK {version}"
 unidiff:recipe="{recipe}"/></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
_RECIPE = re.compile(rb'\sunidiff:recipe="([^"]*)"')
_IDENTITIES = ("bundle", "like", "mask", "replaced")  # a recipe names them, but does not contain them


@dataclass(frozen=True)
class Recipe:
    """How to generate an image again.

    Attributes:
        arguments: of `Catalog.generate`: `catalog.generate(**recipe.arguments)` generates this image alone.
        bundle: fingerprint of the bundle that generated it.
        like, mask: SHA-256 of the images to give as well, if it was made from some. `Hit.sha256` is the same hash.
        replaced: whether a safety hook returned this image for the generated one, so that it cannot be repeated.
    """

    arguments: dict[str, Any]
    bundle: str
    like: str | None = None
    mask: str | None = None
    replaced: bool = False


def save(image: Image.Image, recipe: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write an image with its recipe, without loss. The suffix of the path decides between PNG and WebP.

    Raises:
        OptionError: the path has another suffix.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".webp"):
        raise OptionError(f"{path}: an image is saved with its recipe as .png or .webp; choose one of these suffixes")
    write_atomically(path, encode(image, recipe, path.suffix.lower()))


def encode(image: Image.Image, recipe: Mapping[str, Any], suffix: str = ".png") -> bytes:
    """The file that `save` writes. suffix: ".png" or ".webp"."""
    packet = _PACKET.format(
        source=_PARTLY_GENERATED if recipe.get("mask") else _GENERATED,
        version=version("unidiff-sdk"),
        recipe=html.escape(json.dumps(recipe, ensure_ascii=True, sort_keys=True)),
    )
    buffer = io.BytesIO()
    if suffix == ".webp":
        image.save(buffer, "WEBP", lossless=True, xmp=packet.encode())
    else:
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """The recipe in a file that `Generated.save` wrote.

    Raises:
        ImageError: the file is not an image, or holds no recipe.
    """
    try:
        with Image.open(path, formats=("PNG", "WEBP")) as image:
            image.load()  # in a PNG, text may follow the pixels
            packet = image.info.get("xmp", b"")
        found = _RECIPE.search(packet)
        recipe = parse_json(html.unescape(found[1].decode()), "the recipe", kind=object) if found else None
    except Exception as error:  # decoders raise nearly every built-in exception on damaged files
        raise ImageError(f"{path}: cannot be read as a PNG or WebP image with a recipe ({error})") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("bundle"), str):
        raise ImageError(f"{path}: holds no recipe; Generated.save writes one")
    arguments = {name: value for name, value in recipe.items() if name not in _IDENTITIES}
    return Recipe(arguments, **{name: recipe[name] for name in _IDENTITIES if name in recipe})
