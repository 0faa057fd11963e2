"""Weights written for other libraries: what a family says of it, and safetensors files."""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.core.piecemeal import Deferred
from bivl.weights import matching
from bivl.weights import report as reports
from bivl.weights.rules import Piece, Rule
from bivl.weights.safetensors import KINDS
from bivl.weights.tensors import DTYPES, Tensor

NAMES = {dtype: kind for kind, dtype in KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Origin:
    """Of a model that was converted: what it came from, so that it can be given back as it was."""

    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Its config.json."""
    names: tuple[str, ...] = ()
    """The names of its tensors, those included that ours has no place for."""
    absent: tuple[str, ...] = ()
    """Paths of ours that it had not."""
    family: str = ""
    """Whose it was, wherever it goes."""


@dataclasses.dataclass(frozen=True)
class Export:
    """One of our models as another library's: config.json, model.safetensors and further files."""

    config: Mapping[str, Any]
    """config.json; its `model_type` is what the model is called."""
    table: tuple[Rule, ...]
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Start of a path of ours -> why the library has no such parameter."""
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """Tensors that the library wants and our model has not; of a model that is given back, those
    alone that it had."""
    files: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further files by name, JSON or text: preprocessor, vocabulary; the source's own go first."""


def write_safetensors(path: Path, tensors: Mapping[str, Deferred | Tensor]) -> None:
    """Writes the tensors one after another; in memory is one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        place = {"dtype": NAMES[tensor.dtype.name], "shape": list(tensor.shape)}
        header[name] = place | {"data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            value = tensor.read().astype(tensor.dtype, copy=False)
            assert value.shape == tuple(tensor.shape)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class Written:
    """What is to be written: tensors by name, and conversion.json."""

    tensors: Mapping[str, Deferred | Tensor]
    report: dict


def folder(
    made: Export,
    arrays: Mapping[str, Deferred],
    origin: Origin,
    kept: Mapping[str, Tensor],
    report: dict,
) -> Written:
    """Our arrays by path -> the tensors of an export, to be read in their order: those of one array
    follow each other, so that it need be read but once.

    kept: tensors of the source that ours has no place for, given back as they were; `report` the
    source's conversion.json, which knows the types. UserError for a parameter without a place.
    """
    ours = {path: x.shape for path, x in arrays.items()}
    without = (*made.left_out, *origin.absent)
    names = matching.exported(made.table, ours, without)
    reached = {piece.path for pieces in names.values() for piece in pieces}
    left = {path: _reason(made, origin, path) for path in ours if path not in reached}
    for path, why in left.items():
        if not why:
            raise UserError(
                f"{path} has no place in {made.config['model_type']}; it cannot be left"
            )
    types = {row["source"]: row["dtype"] for row in report.get("mapped", ())}
    tensors, held = {}, {}
    for name, pieces in sorted(names.items(), key=lambda item: [piece.path for piece in item[1]]):
        make = functools.partial(_assembled, pieces, arrays, held)
        dtype = DTYPES[types.get(name, "float32")]
        tensors[name] = Deferred(pieces[0].wanted, dtype, make)
    added = [(name, "given back as it was") for name in kept]
    for name, value in made.constants.items():
        if name not in kept and (not origin.names or name in origin.names):
            added.append((name, "computed: ours has no such parameter"))
            dtype = DTYPES["int64" if value.dtype.kind == "i" else "float32"]
            tensors[name] = Deferred(value.shape, dtype, lambda value=value: value)
    family = str(made.config["model_type"])
    return Written({**tensors, **kept}, reports.exported(family, names, left, added))


def _assembled(
    pieces: Sequence[Piece], arrays: Mapping[str, Deferred], held: dict[str, np.ndarray]
) -> np.ndarray:
    """The tensor of `pieces`; `held` are the arrays that the one before was made of."""
    paths = {piece.path for piece in pieces}
    for path in set(held) - paths:
        del held[path]
    for path in paths - set(held):
        held[path] = arrays[path].read()
    return matching.assemble(pieces, held)


def _reason(made: Export, origin: Origin, path: str) -> str:
    if path in origin.absent:
        return "initialised here: the source had none"
    found = (why for start, why in made.left_out.items() if f"{path}/".startswith(f"{start}/"))
    return next(found, "")
