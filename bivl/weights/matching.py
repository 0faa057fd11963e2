"""Tables and tensors: what of a file has a place in our parameters, reading it, and the way back.

`match` compares a table with the names and shapes of a file and of our parameters, `filled` makes
our arrays of the file's; `exported` and `assemble` make the file's tensors from our arrays again.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.core.piecemeal import Deferred
from bivl.weights import rules
from bivl.weights.rules import Piece, Rule
from bivl.weights.transforms import TRANSFORMS, Shape


@dataclasses.dataclass(frozen=True)
class Match:
    """A file seen through a table; `missing` and `unused` must be empty before anything is read."""

    pieces: tuple[Piece, ...]
    dropped: tuple[tuple[str, str], ...]
    """(source key, why)."""
    missing: tuple[tuple[str, str], ...]
    """(source key that the table expects, our path with its slot)."""
    unused: tuple[str, ...]
    """Source keys that no rule knows, or that our model has no place for."""


NOTHING = Match((), (), (), ())


def match(
    table: Sequence[Rule],
    sources: Mapping[str, Shape],
    ours: Mapping[str, Shape],
    fresh: Sequence[str] = (),
) -> Match:
    """Compares a table with the shapes of a file and of our parameters; reads nothing.

    The first rule that fits a name decides, together with the other parts of the same tensor.
    `fresh` are starts of paths that the file need not have. UserError for a shape that does not
    fit, naming both, and for two tensors of which each would be the same parameter.
    """
    known = [rules.compiled(rule) for rule in table]
    pieces, dropped, unused = [], [], []
    for source in sources:
        fits = ((c, c.source.fullmatch(source)) for c in known)
        first = next(((c, found) for c, found in fits if found), None)
        parts = [c for c in known if first and c.stem == first[0].stem]
        numbers = {k: int(v) for k, v in first[1].groupdict().items()} if first else {}
        made = [c.rule.drop or rules.piece_of(c, source, numbers, ours) for c in parts]
        if not made or None in made:
            unused.append(source)
            continue
        for c, piece in zip(parts, made, strict=True):
            if isinstance(piece, str):
                dropped.append(
                    (source + c.rule.pattern[len(c.rule.pattern.split("[")[0]) :], piece)
                )
            else:
                pieces.append(piece)
    _check(pieces, sources)
    filled = {piece.place for piece in pieces if not piece.added}
    return Match(tuple(pieces), tuple(dropped), _missing(table, ours, filled, fresh), tuple(unused))


def named(table: Sequence[Rule], sources: Iterable[str]) -> set[str]:
    """The names that some rule of the table is about."""
    patterns = [rules.compiled(rule).source for rule in table]
    return {name for name in sources if any(p.fullmatch(name) for p in patterns)}


def _check(pieces: Sequence[Piece], sources: Mapping[str, Shape]) -> None:
    seen: dict[str, str] = {}
    for piece in pieces:
        shape = tuple(sources[piece.source])
        if not piece.fits(shape):
            raise UserError(
                f"{piece.source} has shape {shape}, but {piece.place} {piece.slot} needs "
                f"{piece.wanted}; the file is damaged, or of another kind or size than was taken"
            )
        if not piece.added and seen.setdefault(piece.place, piece.source) != piece.source:
            raise UserError(
                f"{seen[piece.place]} and {piece.source} are both {piece.place}; give a file with "
                "one model"
            )


def _missing(table, ours, filled: set[str], fresh) -> tuple[tuple[str, str], ...]:
    known: dict[str, list[Piece]] = {}
    for piece in rules.places(table, ours):
        if not piece.added:
            known.setdefault(piece.path, []).append(piece)
    missing = []
    for path, shape in ours.items():
        if any(path == start or path.startswith(f"{start}/") for start in fresh):
            continue
        slots = known.get(path, [])
        if sum(math.prod(piece.slot) for piece in slots) != math.prod(shape):
            missing.append(("", path))
        missing += [(piece.source, piece.place) for piece in slots if piece.place not in filled]
    return tuple(missing)


def filled(
    found: Match, tensors: Mapping[str, Any], ours: Mapping[str, Shape]
) -> dict[str, Deferred]:
    """Path -> float32 array of every parameter that the file has; nothing is read before its turn.

    `tensors` map names to objects with `read() -> np.ndarray`. Reading an array raises UserError
    for what is no number or not finite.
    """
    by_path: dict[str, list[Piece]] = {}
    for piece in sorted(found.pieces, key=lambda piece: piece.added):
        by_path.setdefault(piece.path, []).append(piece)

    def fill(path: str) -> np.ndarray:
        array = np.empty(ours[path], np.float32)
        for piece in by_path[path]:
            value = piece.of(checked(piece.source, tensors[piece.source].read()))
            array[piece.index] = array[piece.index] + value if piece.added else value
        return array

    dtype = np.dtype(np.float32)
    return {path: Deferred(ours[path], dtype, functools.partial(fill, path)) for path in by_path}


def checked(name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor, if it is of finite floating-point numbers."""
    if tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
        raise UserError(f"{name} holds {tensor.dtype}, not weights; give another file")
    with np.errstate(over="ignore"):  # what float32 cannot hold is not finite either
        long = tensor.dtype.itemsize > 4
        finite = np.isfinite(tensor.astype(np.float32) if long else tensor).all()
    if not finite:
        raise UserError(f"{name} holds values that are not finite; give a file that is whole")
    return tensor


def exported(
    table: Sequence[Rule], ours: Mapping[str, Shape], without: Sequence[str] = ()
) -> dict[str, list[Piece]]:
    """Source name -> the pieces it is made of, in the table's order, of all of `ours` that the
    table has but what lies under `without`."""
    names: dict[str, list[Piece]] = {}
    for piece in rules.places(table, ours):
        if not any(piece.path == start or piece.path.startswith(f"{start}/") for start in without):
            names.setdefault(piece.source, []).append(piece)
    return {name: sorted(parts, key=lambda piece: piece.part) for name, parts in names.items()}


def assemble(pieces: Sequence[Piece], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The source tensor of `pieces`, float32, from our arrays by path."""
    parts = [
        TRANSFORMS[piece.transform].theirs(np.asarray(arrays[piece.path][piece.index], np.float32))
        for piece in pieces
    ]
    return np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), order="C")
