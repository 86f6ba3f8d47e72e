"""The attributes of a synthetic product that a text names, read by a vocabulary written down here, not the data's."""

from __future__ import annotations

import re

TYPES = {
    "t-shirt": ("t-shirt", "tee"),
    "shirt": ("shirt", "button-up shirt"),
    "sweater": ("sweater", "pullover", "jumper"),
    "hoodie": ("hoodie", "hooded sweatshirt"),
    "jacket": ("jacket", "open jacket"),
    "vest": ("vest", "waistcoat"),
    "trousers": ("trousers", "pants"),
    "shorts": ("shorts", "pair of shorts"),
    "dress": ("dress", "gown"),
    "skirt": ("skirt",),
    "blouse": ("blouse", "blouse with a bow"),
    "tank top": ("tank top", "strap top"),
    "coat": ("coat", "belted coat"),
    "jumpsuit": ("jumpsuit", "overall"),
    "boots": ("boots", "pair of boots"),
    "handbag": ("handbag", "purse"),
    "mug": ("mug", "cup"),
    "bottle": ("bottle",),
    "vase": ("vase",),
    "lamp": ("lamp", "table lamp"),
    "backpack": ("backpack", "rucksack"),
    "chair": ("chair",),
    "cushion": ("cushion", "pillow"),
    "teapot": ("teapot",),
}
COLORS = {
    "red": ("red", "crimson"),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "teal": ("teal", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "brown": ("brown",),
    "black": ("black",),
}
PATTERNS = {
    "solid": ("plain", "solid", "in one colour", "without pattern"),
    "striped": ("striped", "banded", "stripes"),
    "diagonal": ("diagonally striped", "bias striped", "diagonal stripes"),
    "checked": ("checked", "plaid", "checks"),
    "dotted": ("dotted", "polka dot", "spotted", "dots"),
}
CUTS = {"short": ("short", "cropped"), "long": ("long",), "slim": ("slim", "narrow"), "loose": ("loose", "oversized")}
MEASURES = {"low": ("low", "short"), "tall": ("tall",), "slim": ("slim", "narrow"), "wide": ("wide",)}
GOODS = {"mug", "bottle", "vase", "lamp", "backpack", "chair", "cushion", "teapot"}  # the rest is clothing

SECOND_COLOR = re.compile(r"\bwith (white|black|yellow|navy|pink)\b")
BACKGROUND = re.compile(r"\bon \w+ ground\b")
FILLERS = {"a", "an", "the", "in", "with", "and"}


def named_attributes(text: str) -> tuple[dict[str, str], set[str]]:
    """The attributes that `text` names, {column: value}, and the words that name none."""
    attributes: dict[str, str] = {}
    rest = BACKGROUND.sub(" ", text.lower())
    if second := SECOND_COLOR.search(rest):
        attributes["colour2"] = second[1]
        rest = SECOND_COLOR.sub(" ", rest)
    rest = take(rest, "type", TYPES, attributes)
    rest = take(rest, "pattern", PATTERNS, attributes)
    rest = take(rest, "colour", COLORS, attributes)
    if attributes.get("type") in GOODS:
        rest = take(rest, "height", {name: MEASURES[name] for name in ("low", "tall")}, attributes)
        rest = take(rest, "width", {name: MEASURES[name] for name in ("slim", "wide")}, attributes)
    else:
        rest = take(rest, "length", {name: CUTS[name] for name in ("short", "long")}, attributes)
        rest = take(rest, "fit", {name: CUTS[name] for name in ("slim", "loose")}, attributes)
    return attributes, set(re.findall(r"[\w-]+", rest)) - FILLERS


def take(text: str, column: str, names: dict[str, tuple[str, ...]], attributes: dict[str, str]) -> str:
    """Note the value of `column` that `text` names, and return the text without it. Longer phrases go first."""
    phrases = {phrase: value for value, wordings in names.items() for phrase in wordings}
    for phrase in sorted(phrases, key=len, reverse=True):
        pattern = rf"(?<![\w-]){re.escape(phrase)}(?![\w-])"
        if re.search(pattern, text):
            attributes[column] = phrases[phrase]
            return re.sub(pattern, " ", text, count=1)
    return text
