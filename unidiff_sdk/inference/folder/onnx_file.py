"""What an ONNX file states about itself, read from its protobuf without the onnx package and without its weights.

The message and field numbers are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from unidiff_sdk._internal.files import open_regular_file
from unidiff_sdk.errors import BundleError
from unidiff_sdk.inference.manifest import TensorSpec

__all__ = ["OnnxFile", "read_onnx_file"]

MAX_NESTING = 64
"""The deepest nesting of messages: graphs in attributes of nodes. Protobuf itself stops at 100."""

# Data types of TensorProto, as NumPy names them.
DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
    16: "bfloat16",
}

# The messages that can contain a tensor, with the fields that lead to it: {message: {field: message}}.
_GRAPHS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_GRAPH, _INPUT, _OUTPUT, _INITIALIZER = 7, 11, 12, 5
_OPERATOR = 4  # of a node
_EXTERNAL_DATA = 13  # of a tensor
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]
"""Where a message starts and ends in the file."""


@dataclass
class OnnxFile:
    """The interface of a graph, and what it needs besides its own file.

    Attributes:
        inputs, outputs: by name. The shape of a tensor is None if the file does not state it.
        external_files: the files with weights that it names, relative to its own folder.
        operators: the types of its nodes.
    """

    inputs: dict[str, TensorSpec | None] = field(default_factory=dict)
    outputs: dict[str, TensorSpec | None] = field(default_factory=dict)
    external_files: set[str] = field(default_factory=set)
    operators: set[str] = field(default_factory=set)


class _Damaged(Exception):
    """The bytes are not the message that is expected."""


def read_onnx_file(path: Path) -> OnnxFile:
    """Read an ONNX file. It is mapped into memory, and its weights are not read.

    Raises:
        BundleError: it is missing or not an ONNX graph.
    """
    with open_regular_file(path, BundleError) as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _read_model(content)
        except (_Damaged, UnicodeDecodeError, ValueError, OSError) as error:  # ValueError: an empty file
            raise BundleError(
                f"{path}: ONNX Runtime cannot load this graph, as it is not ONNX ({error}); export the bundle again"
            ) from None


def _read_model(content: mmap.mmap) -> OnnxFile:
    found, initialized = OnnxFile(), set()
    whole = (0, len(content))
    for graph in _messages(content, whole, _GRAPH):
        for number, value in _fields(content, graph):
            if number in (_INPUT, _OUTPUT) and isinstance(value, tuple):
                name, tensor = _tensor(content, value)
                (found.inputs if number == _INPUT else found.outputs)[name] = tensor
            elif number == _INITIALIZER and isinstance(value, tuple):
                initialized |= {_text(content, name) for name in _messages(content, value, 8)}
    if not found.outputs:
        raise _Damaged("it has no outputs")
    # Old versions of ONNX list weights as inputs, too. They need no value from the caller.
    found.inputs = {name: tensor for name, tensor in found.inputs.items() if name not in initialized}
    _visit(content, whole, "model", found, 0)
    return found


def _visit(content: mmap.mmap, span: Span, message: str, found: OnnxFile, depth: int) -> None:
    """Collect the external files and operators of a message and of those in it."""
    if depth > MAX_NESTING:
        raise _Damaged(f"graphs are nested more than {MAX_NESTING} levels deep")
    if message == "tensor":
        for entry in _messages(content, span, _EXTERNAL_DATA):
            if "location" in [_text(content, key) for key in _messages(content, entry, 1)]:
                found.external_files |= {_text(content, value) for value in _messages(content, entry, 2)}
        return
    inner: Mapping[int, str] = _GRAPHS[message]
    for number, value in _fields(content, span):
        if not isinstance(value, tuple):
            continue
        if number in inner:
            _visit(content, value, inner[number], found, depth + 1)
        elif message == "node" and number == _OPERATOR:
            found.operators.add(_text(content, value))


def _tensor(content: mmap.mmap, span: Span) -> tuple[str, TensorSpec | None]:
    """Name and type of a ValueInfoProto. None: no tensor, or one without a shape."""
    names = [_text(content, name) for name in _messages(content, span, 1)]
    dtype: str | None = None
    shape: tuple[int | str, ...] | None = None
    for kind in _messages(content, span, 2):
        for tensor in _messages(content, kind, 1):
            for number, value in _fields(content, tensor):
                if number == 1 and isinstance(value, int):
                    dtype = DTYPES.get(value, f"type {value}")
                elif number == 2 and isinstance(value, tuple):
                    shape = tuple(_axis(content, axis) for axis in _messages(content, value, 1))
    return names[-1] if names else "", None if dtype is None or shape is None else TensorSpec(dtype, shape)


def _axis(content: mmap.mmap, span: Span) -> int | str:
    axis: int | str = "?"
    for number, value in _fields(content, span):
        if number == 1 and isinstance(value, int):
            axis = value
        elif number == 2 and isinstance(value, tuple):
            axis = _text(content, value)
    return axis


# Protobuf's wire format


def _messages(content: mmap.mmap, span: Span, wanted: int) -> Iterator[Span]:
    return (value for number, value in _fields(content, span) if number == wanted and isinstance(value, tuple))


def _text(content: mmap.mmap, span: Span) -> str:
    return content[span[0] : span[1]].decode("utf-8")


def _fields(content: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """Number and value of each field of a message: an integer, or where the bytes are."""
    position, end = span
    while position < end:
        tag = content[position]
        position += 1
        if tag > 127:  # most tags are one byte, and a graph has tens of thousands
            tag, position = _varint(content, position - 1, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            integer, position = _varint(content, position, end)
            yield number, integer
            continue
        if kind == _BYTES:
            length = content[position] if position < end else 128
            position += 1
            if length > 127:
                length, position = _varint(content, position - 1, end)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise _Damaged(f"a field has the wire type {kind}")
        if number == 0 or length > end - position:
            raise _Damaged("a field is longer than its message")
        yield number, (position, position + length)
        position += length


def _varint(content: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end and shift < 64:
        byte = content[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise _Damaged("an integer has no end")
