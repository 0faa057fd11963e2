"""Weights written for other libraries: what a family says of it, and safetensors files."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.weights import matching
from bivl.weights import report as reports
from bivl.weights.rules import Rule
from bivl.weights.safetensors import KINDS
from bivl.weights.tensors import DTYPES

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


@dataclasses.dataclass(frozen=True)
class Saved:
    """A tensor to be written: `make` gives it when its turn comes."""

    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], np.ndarray]


def write_safetensors(path: Path, tensors: Mapping[str, Saved]) -> None:
    """Writes the tensors one after another; in memory is one at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
        place = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape)}
        header[name] = place | {"data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            value = tensor.make().astype(DTYPES[tensor.dtype])
            assert value.shape == tensor.shape
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class Written:
    """What is to be written: tensors by name, and conversion.json."""

    tensors: Mapping[str, Saved]
    report: dict


def folder(
    made: Export, arrays: Mapping[str, np.ndarray], origin: Origin, kept: Mapping, report: dict
) -> Written:
    """Our arrays by path -> the tensors of an export.

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
    tensors = {}
    for name, pieces in names.items():
        make = functools.partial(matching.assemble, pieces, arrays)
        tensors[name] = Saved(pieces[0].wanted, types.get(name, "float32"), make)
    added = [(name, "given back as it was") for name in kept]
    for name, value in made.constants.items():
        if name not in kept and (not origin.names or name in origin.names):
            added.append((name, "computed: ours has no such parameter"))
            dtype = "int64" if value.dtype.kind == "i" else "float32"
            tensors[name] = Saved(value.shape, dtype, lambda value=value: value)
    for name, tensor in kept.items():
        tensors[name] = Saved(tuple(tensor.shape), str(tensor.dtype), tensor.read)
    family = str(made.config["model_type"])
    return Written(tensors, reports.exported(family, names, left, added))


def _reason(made: Export, origin: Origin, path: str) -> str:
    if path in origin.absent:
        return "initialised here: the source had none"
    found = (why for start, why in made.left_out.items() if f"{path}/".startswith(f"{start}/"))
    return next(found, "")
