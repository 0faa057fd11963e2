"""NumPy's .npz files: a zip archive of arrays, never of pickles.

Format: NEP 1, `numpy/lib/format.py`. The header is Python's text of a dict; only the one form that
NumPy writes is read, by a pattern.
"""

import math
import re
import struct
from collections.abc import Mapping

from bivl.weights.safetensors import contiguous
from bivl.weights.stored import Extent, File
from bivl.weights.tensors import DTYPES, MAX_DIMENSIONS, Tensor, check_total, placed

_MAX_HEADER = 2**16
_SIZES = {(1, 0): "<H", (2, 0): "<I", (3, 0): "<I"}
_HEADER = re.compile(
    r"\{'descr': '([<>|=])([a-zA-Z]\d{1,3})', 'fortran_order': (True|False), "
    r"'shape': \(((?:\d{1,19},? ?)*)\), \} *\n"
)
_KINDS = {
    **{"b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64"},
    **{"u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64"},
    **{"f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128"},
}


def open_npz(file: File, entries: Mapping[str, Extent]) -> dict[str, Tensor]:
    """The arrays of an archive with `entries`. UserError for what is no array of numbers."""
    named = [(name.removesuffix(".npy"), entry) for name, entry in entries.items()]
    tensors = {name: _tensor(name, entry) for name, entry in named}
    if len(tensors) != len(entries):
        raise file.error("has two arrays of one name")
    check_total(file, tensors.values())
    return tensors


def _tensor(name: str, entry: Extent) -> Tensor:
    start = entry.peek(12)
    size_kind = _SIZES.get(tuple(start[6:8])) if start[:6] == b"\x93NUMPY" else None
    if size_kind is None or len(start) < 12:
        raise entry.error("is no array of NumPy's")
    (size,) = struct.unpack_from(size_kind, start, 8)
    base = 8 + struct.calcsize(size_kind) + size
    if size > _MAX_HEADER or base > entry.size:
        raise entry.error("has a damaged header")
    text = entry.peek(base)[base - size :].decode("latin-1")
    match = _HEADER.fullmatch(text)
    kind = _KINDS.get(match[2]) if match else None
    if match is None or kind is None:
        raise entry.error(
            "is no array of plain numbers: objects are never read, and NumPy's files cannot say "
            "bfloat16",
            "save arrays of float32 or whole numbers, or safetensors",
        )
    dtype, shape = DTYPES[kind], tuple(int(n) for n in re.findall(r"\d+", match[4]))
    if len(shape) > MAX_DIMENSIONS or math.prod(shape) * dtype.itemsize != entry.size - base:
        raise entry.error(f"of shape {shape} is of another length")
    strides = contiguous(shape, dtype.itemsize)
    if match[3] == "True":
        strides = contiguous(shape[::-1], dtype.itemsize)[::-1]
    order = ">" if match[1] == ">" else "<"
    return placed(name, Tensor(shape, dtype, entry, base, strides, order))
