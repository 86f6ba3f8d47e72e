"""Where a picture comes from, written into its file: that a model drew it, and what makes it again.

The file carries an XMP packet, in PNG and WebP alike, with the IPTC property that search engines and shops read to tell
drawn pictures from photographs (`Iptc4xmpExt:DigitalSourceType`, IPTC Photo Metadata Standard 2023.1), and the recipe
as JSON. A lossless file, so that drawing it again can be compared bit by bit.
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
from unidiff_sdk.errors import ImageError, OptionError

__all__ = ["Recipe", "read_recipe", "save"]

_DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
_PARTLY_DRAWN = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
><rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:unidiff="urn:unidiff:recipe:1"
 Iptc4xmpExt:DigitalSourceType="{source}" xmp:CreatorTool="UniDiff SDK {version}"
 unidiff:recipe="{recipe}"/></rdf:RDF></x:xmpmeta>
<?xpacket end="w"?>"""
_RECIPE = re.compile(rb'\sunidiff:recipe="([^"]*)"')
_IDENTITIES = ("bundle", "like", "mask", "replaced")  # what a recipe names, but cannot hold


@dataclass(frozen=True)
class Recipe:
    """What makes a picture again.

    Attributes:
        arguments: of `Catalog.generate`: `catalog.generate(**recipe.arguments)` draws this picture alone.
        bundle: fingerprint of the bundle that drew it.
        like, mask: SHA-256 of the pictures that must be given as well, as `Hit.sha256` is, if it was made from some.
        replaced: whether a safety hook put this picture in the place of the drawn one, so that it cannot be repeated.
    """

    arguments: dict[str, Any]
    bundle: str
    like: str | None = None
    mask: str | None = None
    replaced: bool = False


def save(image: Image.Image, recipe: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Write a picture with its recipe; PNG or WebP, by the name's ending, without loss.

    Raises:
        OptionError: the name ends otherwise.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    packet = _PACKET.format(
        source=_PARTLY_DRAWN if recipe.get("mask") else _DRAWN,
        version=version("unidiff-sdk"),
        recipe=html.escape(json.dumps(recipe, ensure_ascii=True, sort_keys=True)),
    )
    buffer = io.BytesIO()
    if path.suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet)
        image.save(buffer, "PNG", pnginfo=info)
    elif path.suffix.lower() == ".webp":
        image.save(buffer, "WEBP", lossless=True, xmp=packet.encode())
    else:
        raise OptionError(f"{path}: a picture is saved with its recipe as .png or .webp; give such a name")
    write_atomically(path, buffer.getvalue())


def read_recipe(path: str | PathLike[str]) -> Recipe:
    """The recipe in a file that `Generated.save` wrote.

    Raises:
        ImageError: the file is no picture, or holds no recipe.
    """
    try:
        with Image.open(path, formats=("PNG", "WEBP")) as image:
            image.load()  # in a PNG, text may follow the pixels
            packet = image.info.get("xmp", b"")
        found = _RECIPE.search(packet)
        recipe = json.loads(html.unescape(found[1].decode())) if found else None
    except Exception as error:  # decoders raise nearly every built-in exception on damaged files
        raise ImageError(f"{path}: cannot be read as a PNG or WebP picture with a recipe ({error})") from error
    if not isinstance(recipe, dict) or not isinstance(recipe.get("bundle"), str):
        raise ImageError(f"{path}: holds no recipe; Generated.save(…) writes one")
    arguments = {name: value for name, value in recipe.items() if name not in _IDENTITIES}
    return Recipe(arguments, **{name: recipe[name] for name in _IDENTITIES if name in recipe})
