"""Mutations: of bytes, of JSON values, and of file formats whose checksums and lengths are kept valid."""

from __future__ import annotations

import copy
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = [
    "mutate_bytes",
    "mutate_gif",
    "mutate_jpeg",
    "mutate_json",
    "mutate_png",
    "mutate_tar",
    "mutate_tiff",
    "mutate_value",
    "mutate_webp",
    "odd_value",
    "to_text",
]

_BOUNDARIES = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1)

_ODD_STRINGS = (
    "",
    " ",
    "\0",
    "a\0b",
    "../../etc/passwd",
    "/etc/passwd",
    "file:///etc/passwd",
    "C:\\x\\y",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "é",
    "e\u0301",
    "\ud800",
    "\U0001f600",
    "NaN",
    "null",
    "1e999",
    "0x10",
    "2024-02-30",
    "2024-01-01T00:00:00+99:99",
    "99999-01-01",
    "$ne",
    "_unidiff",
    'size 12"',
    "a.b[].c",
    "a" * 10_000,
)
_BIG_DIGITS = "@@5000 digits@@"  # replaced by a literal that Python's int() refuses


# ------------------------------------------------------------------------------------------------ bytes


def mutate_bytes(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Apply one to four mutations that know nothing of the format; `others` are files to splice with."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(_BYTE_MUTATIONS)(rng, result, others)
    return bytes(result)


def _flip_bits(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _flip in range(rng.choice((1, 1, 4, 16))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_bytes(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    for _set in range(rng.choice((1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))


def _set_number(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    code = rng.choice("HIQ")
    size = struct.calcsize(f"<{code}")
    if len(data) >= size:
        value = rng.choice(_BOUNDARIES) % (1 << 8 * size)
        struct.pack_into(rng.choice("<>") + code, data, rng.randrange(len(data) - size + 1), value)


def _truncate(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _delete(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : start + rng.choice((1, 4, 64, 1024))]


def _insert(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice((rng.randbytes(rng.choice((1, 8, 256))), bytes(rng.choice((1, 512, 65536)))))


def _repeat(rng: Random, data: bytearray, _: Sequence[bytes]) -> None:
    start = rng.randrange(len(data) + 1)
    block = data[start : start + rng.choice((1, 16, 256))]
    data[start:start] = block * rng.choice((1, 2, 100))


def _splice(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    other = rng.choice(others) if others else bytes(data)
    data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]


_BYTE_MUTATIONS: tuple[Callable[[Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip_bits,
    _flip_bits,
    _set_bytes,
    _set_bytes,
    _set_number,
    _truncate,
    _delete,
    _insert,
    _repeat,
    _splice,
)


# ------------------------------------------------------------------------------------------------ JSON


def odd_value(rng: Random) -> Any:
    """A JSON value of any type, often at a boundary."""
    number = rng.choice(_BOUNDARIES)
    return rng.choice(
        (
            None,
            True,
            False,
            number,
            -number,
            2**64,
            10**30,
            0.1,
            -0.0,
            1e308,
            5e-324,
            float("nan"),
            float("inf"),
            _BIG_DIGITS,
            rng.choice(_ODD_STRINGS),
            rng.choice(_ODD_STRINGS),
            [],
            {},
            [None],
            [rng.choice(_ODD_STRINGS)] * rng.choice((1, 300)),
            {rng.choice(_ODD_STRINGS): number},
            _nested(rng.choice((20, 40, 120))),
        )
    )


def _nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def mutate_value(rng: Random, value: Any, odd: Callable[[Random], Any] = odd_value) -> Any:
    """Return a copy of a JSON value with one to three nodes changed, removed, renamed, repeated or exchanged."""
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(root))
        container, key = rng.choice(places)
        old = container[key]
        match rng.randrange(9):
            case 0 | 1 | 2:
                container[key] = odd(rng)
            case 3 if container is not root:
                del container[key]
            case 4 if isinstance(container, dict):
                container[rng.choice((*_ODD_STRINGS, f"{key}2", str(key).upper()))] = container.pop(key)
            case 5:
                container[key] = rng.choice(([old], {"value": old}, [old, old], str(old)))
            case 6 if isinstance(old, (int, float)) and not isinstance(old, bool):
                container[key] = rng.choice((-old, old + 1, old * 1000, float(old), str(old), old / 3, bool(old)))
            case 7:
                other, name = rng.choice(places)
                container[key] = copy.deepcopy(other[name])
            case _:
                if isinstance(old, dict):
                    old[rng.choice(_ODD_STRINGS)] = odd(rng)
                elif isinstance(old, list):
                    old.append(odd(rng))
                elif isinstance(old, str) and old:
                    cut = rng.randrange(len(old) + 1)
                    container[key] = old[:cut] + rng.choice(_ODD_STRINGS) + old[cut:]
                else:
                    container[key] = odd(rng)
    return root[0]


def _places(container: Any) -> Any:
    for key in list(container) if isinstance(container, dict) else range(len(container)):
        yield container, key
        if isinstance(container[key], (dict, list)):
            yield from _places(container[key])


def to_text(value: Any) -> bytes:
    """Write JSON as Python does, with NaN and lone surrogates escaped."""
    return json.dumps(value).replace(f'"{_BIG_DIGITS}"', "9" * 5000).encode()


def mutate_json(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Mutate a JSON document: its values mostly, its bytes sometimes."""
    if rng.random() < 0.25:
        return mutate_bytes(rng, data, others)
    text = to_text(mutate_value(rng, json.loads(data)))
    return mutate_bytes(rng, text) if rng.random() < 0.1 else text


# ------------------------------------------------------------------------------------------------ images


def _number(rng: Random, bits: int) -> int:
    choices = (*_BOUNDARIES, rng.getrandbits(bits), rng.randrange(20), 4000, 7999, 8000, 20_000)
    return rng.choice(choices) % (1 << bits)


def mutate_png(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate chunks, with their checksums computed again."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    chunks, position = [], 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunks.append((data[position + 4 : position + 8], data[position + 8 : position + 8 + length]))
        position += 12 + length
    k = rng.randrange(len(chunks))
    kind, content = chunks[k]
    match rng.randrange(7):
        case 0 | 1:
            header = list(struct.unpack(">IIBBBBB", chunks[0][1]))
            field = rng.randrange(7)
            header[field] = _number(rng, 32 if field < 2 else 8)
            chunks[0] = (b"IHDR", struct.pack(">IIBBBBB", *header))
        case 2:
            chunks[k] = (kind, mutate_bytes(rng, content))
        case 3:
            chunks.insert(rng.randrange(len(chunks) + 1), chunks[k])
        case 4:
            del chunks[k]
        case 5:
            chunks[k] = (rng.choice((b"tRNS", b"PLTE", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"eXIf")), content)
        case _:
            pixels = zlib.compress(bytes(rng.choice((0, 1, 10, 10_000, 5_000_000))), 9)
            chunks = [(name, pixels if name == b"IDAT" else body) for name, body in chunks]
    body = b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return data[:8] + body


def mutate_jpeg(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate marker segments, with their lengths kept valid."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    segments, position = [], 2
    while position + 4 <= len(data) and data[position + 1] != 0xDA:
        length = struct.unpack_from(">H", data, position + 2)[0]
        segments.append((data[position + 1], data[position + 4 : position + 2 + length]))
        position += 2 + length
    scans = data[position:]
    k = rng.randrange(len(segments))
    marker, content = segments[k]
    match rng.randrange(6):
        case 0 | 1:
            frame = next(i for i, (name, _) in enumerate(segments) if 0xC0 <= name <= 0xC2)
            name, body = segments[frame]
            fields = bytearray(body)
            struct.pack_into(">H", fields, rng.choice((1, 3)), _number(rng, 16))
            if rng.random() < 0.3:
                fields[rng.choice((0, 5, 7))] = _number(rng, 8)
            segments[frame] = (rng.choice((name, name, 0xC0, 0xC1, 0xC2, 0xC9)), bytes(fields))
        case 2:
            segments[k] = (marker, mutate_bytes(rng, content)[:65533])
        case 3:
            segments.insert(rng.randrange(len(segments) + 1), segments[k])
        case 4:
            del segments[k]
        case _:
            scans = scans * rng.choice((2, 30, 200)) if rng.random() < 0.5 else mutate_bytes(rng, scans)
    head = b"".join(bytes((0xFF, name)) + struct.pack(">H", len(body) + 2) + body for name, body in segments)
    return data[:2] + head + scans


def mutate_webp(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate RIFF chunks and the sizes in their headers."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, others)
    chunks, position = [], 12
    while position + 8 <= len(data):
        length = struct.unpack_from("<I", data, position + 4)[0]
        chunks.append((data[position : position + 4], data[position + 8 : position + 8 + length]))
        position += 8 + length + length % 2
    k = rng.randrange(len(chunks))
    kind, content = chunks[k]
    match rng.randrange(5):
        case 0 | 1:
            fields = bytearray(content.ljust(10, b"\0"))
            struct.pack_into("<I", fields, rng.choice((1, 3, 4, 6)), _number(rng, 32))
            chunks[k] = (kind, bytes(fields))
        case 2:
            canvas = struct.pack("<I", rng.randrange(256)) + _number(rng, 24).to_bytes(3, "little") * 2
            chunks.insert(0, (b"VP8X", canvas))
        case 3:
            chunks.insert(rng.randrange(len(chunks) + 1), (rng.choice((kind, b"ANIM", b"ANMF", b"ALPH")), content))
        case _:
            chunks[k] = (kind, mutate_bytes(rng, content))
    body = b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def mutate_gif(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate the sizes of screen and frames, the flags and the blocks."""
    if rng.random() < 0.4:
        return mutate_bytes(rng, data, others)
    result = bytearray(data)
    frame = result.find(b"\x2c", 13)
    place = rng.choice((6, 8, frame + 1, frame + 3, frame + 5, frame + 7))
    match rng.randrange(3):
        case 0 | 1:
            struct.pack_into("<H", result, place, _number(rng, 16))
        case _:
            result[rng.choice((10, 11, frame + 9, frame + 10))] = rng.randrange(256)
    return bytes(result) if rng.random() < 0.7 else mutate_bytes(rng, bytes(result))


def mutate_tiff(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate the entries of the directory: tag, type, count or value."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    order = "<" if data[:2] == b"II" else ">"
    result = bytearray(data)
    (directory,) = struct.unpack_from(f"{order}I", result, 4)
    (count,) = struct.unpack_from(f"{order}H", result, directory)
    for _ in range(rng.choice((1, 1, 2))):
        entry = directory + 2 + 12 * rng.randrange(count)
        match rng.randrange(5):
            case 0:
                tags = (256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 330, 338, 339)
                struct.pack_into(f"{order}H", result, entry, rng.choice(tags))
            case 1:
                struct.pack_into(f"{order}H", result, entry + 2, rng.randrange(20))
            case 2:
                struct.pack_into(f"{order}I", result, entry + 4, _number(rng, 32))
            case 3:
                struct.pack_into(f"{order}I", result, entry + 8, _number(rng, 32))
            case _:
                value = rng.choice((0, 1, 2, 3, 5, 6, 7, 8, 32773, 32946, 34712, 50000))
                struct.pack_into(f"{order}H", result, entry + 8, value)
    return bytes(result)


# ------------------------------------------------------------------------------------------------ tar

# Fields of a header: (offset, length).
_TAR_FIELDS = {"name": (0, 100), "mode": (100, 8), "size": (124, 12), "type": (156, 1), "link": (157, 100)}
_TAR_MAGIC, _TAR_PREFIX = (257, 8), (345, 155)


def mutate_tar(rng: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Mutate headers, with their checksums computed again, and the members themselves."""
    if rng.random() < 0.3:
        return mutate_bytes(rng, data, others)
    result = bytearray(data)
    headers, position = [], 0
    while position + 512 <= len(result) and result[position]:
        headers.append(position)
        size = int(result[position + 124 : position + 135].strip(b"\0 ") or b"0", 8)
        position += 512 + (size + 511) // 512 * 512
    for _ in range(rng.choice((1, 1, 2))):
        header = rng.choice(headers)
        field = rng.choice(
            ("name", "name", "size", "size", "type", "type", "link", "mode", "content", "magic", "prefix")
        )
        if field == "content":
            start = header + 512
            if start < len(result):
                result[start + rng.randrange(min(512, len(result) - start))] = rng.randrange(256)
            continue
        offset, length = {**_TAR_FIELDS, "magic": _TAR_MAGIC, "prefix": _TAR_PREFIX}[field]
        result[header + offset : header + offset + length] = _tar_value(rng, field, length)
        blank = bytes(result[header : header + 148]) + b" " * 8 + bytes(result[header + 156 : header + 512])
        result[header + 148 : header + 156] = b"%06o\0 " % sum(blank)
    return bytes(result)


def _tar_value(rng: Random, field: str, length: int) -> bytes:
    if field == "size":
        sizes = (b"77777777777", b"-0000000001", b"999", b"0", b"17", b"\xff" * 12, b"\x80" + rng.randbytes(11))
        return rng.choice(sizes).ljust(length, b"\0")[:length]
    if field == "type":
        return rng.choice(b"0123456789LKxgSDVMN\0\xff".decode("latin-1")).encode("latin-1")
    if field in ("name", "link", "prefix"):
        text = rng.choice((*_ODD_STRINGS, "0.json", "0.txt", "1.png", "x/../../0.png", "no-suffix", ".png"))
        return text.encode("utf-8", "surrogatepass")[:length].ljust(length, b"\0")
    return rng.randbytes(length)
