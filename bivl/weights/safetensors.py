"""Safetensors files: a JSON header that names types, shapes and places, then the numbers.

Format: the README of huggingface/safetensors, all of whose checks are made.
"""

import json
import math
from typing import Any

from bivl.weights.stored import Extent, File, shown
from bivl.weights.tensors import DTYPES, MAX_DIMENSIONS, Tensor, placed

MAX_HEADER = 100_000_000
_MAX_MARKS = 2**21  # brackets, quotes and commas of a JSON text: they bound what it is in memory
KINDS = {
    **{"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16"},
    **{"U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "C64": "complex64"},
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"},
}


def open_safetensors(file: File) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a file.

    Raises:
      UserError: a header that is too large or no JSON, names that come twice, unknown types, and
        tensors that overlap, leave holes, or are not as long as their type and shape say.
    """
    if file.size < 8:
        raise file.error("ends too early")
    size = int.from_bytes(file.read(0, 8), "little")
    if size > MAX_HEADER or 8 + size > file.size:
        raise file.error("has a damaged header, or ends too early")
    header = json_object(file, file.read(8, size))
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(type(v) is str for v in metadata.values()):
        raise file.error("has metadata that is no text")
    tensors = {name: _tensor(file, name, info, 8 + size) for name, info in header.items()}
    end = 8 + size
    # Empty tensors take no place: they come before what starts where they do.
    for name, tensor in sorted(tensors.items(), key=lambda i: (i[1].extent.start, i[1].nbytes)):
        if tensor.extent.start != end:
            raise file.error(f"{shown(name)} overlaps with another tensor, or leaves a hole")
        end += tensor.nbytes
    if end != file.size:
        raise file.error("is longer or shorter than its header says")
    return tensors, metadata


def _tensor(file: File, name: str, info: Any, base: int) -> Tensor:
    if type(info) is not dict or set(info) != {"dtype", "shape", "data_offsets"}:
        raise file.error(f"{shown(name)} lacks a type, shape or place")
    kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(kind) is not str or kind not in KINDS:
        raise file.error(f"{shown(name)} has the unknown type {shown(kind)}", "convert it first")
    lists = type(shape) is list and type(offsets) is list
    if not lists or len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise file.error(f"{shown(name)} has no valid shape or place")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (*shape, *offsets)):
        raise file.error(f"{shown(name)} has no valid shape or place")
    dtype, (start, stop) = DTYPES[KINDS[kind]], offsets
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise file.error(f"{shown(name)} of shape {shape} and type {kind} is of another length")
    extent = Extent(file, name, base + start, stop - start, stop - start)
    return placed(name, Tensor(tuple(shape), dtype, extent, 0, contiguous(shape, dtype.itemsize)))


def contiguous(shape: list[int] | tuple[int, ...], size: int) -> tuple[int, ...]:
    """Bytes between the elements of each axis, for elements of `size` bytes in a row."""
    return tuple(size * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def json_object(file: File, data: bytes) -> dict[str, Any]:
    """The JSON object in `data`, with no name twice and no number that JSON lacks."""
    if sum(data.count(mark) for mark in b'[{",') > _MAX_MARKS:
        raise file.error("has far more entries than a model needs")
    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise file.error("has JSON that is nested too deeply") from None
    except ValueError as error:
        cause = error.args[0] if type(error) is ValueError else "it cannot be parsed"
        raise file.error(f"has damaged JSON: {shown(cause)}") from None
    if type(value) is not dict:
        raise file.error("has JSON that is no object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if not all(_is_text(part) for pair in pairs for part in pair if type(part) is str):
        raise ValueError("a text is no Unicode")
    if len(made) != len(pairs):
        raise ValueError("a name comes twice")
    return made


def _is_text(text: str) -> bool:
    """Whether it can be written: JSON's escapes can spell halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")
