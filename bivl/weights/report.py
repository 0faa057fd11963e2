"""What became of every tensor: conversion.json, the table that is printed, and the first error."""

from collections.abc import Sequence
from typing import Any

from bivl.core.errors import UserError
from bivl.weights.matching import Match
from bivl.weights.plan import Plan
from bivl.weights.rules import Piece


def imported(weights, plan: Plan, found: Match, aside: Match, fresh) -> dict[str, Any]:
    """Of conversion.json what becomes of tensors and parameters; `aside`: the teacher, `fresh`: the
    paths that are initialised."""
    tensors = weights.tensors
    mapped = [(piece, piece.place) for piece in found.pieces]
    mapped += [(piece, f"teacher/{piece.place}") for piece in aside.pieces]
    dropped = [*found.dropped, *aside.dropped]
    dropped += [(key, f"not of the model: {what}") for key, what in weights.left.items()]
    missing = [*found.missing, *((key, f"teacher/{path}") for key, path in aside.missing)]
    return {
        "mapped": [_line(piece.source, path, tensors[piece.source]) for piece, path in mapped],
        "dropped": [{"key": key, "reason": reason} for key, reason in dropped],
        "initialised": [{"path": path, "reason": _why(plan, path)} for path in fresh],
        "missing": [{"key": key, "path": path} for key, path in missing],
        "unused": [*found.unused, *aside.unused],
    }


def _line(source: str, path: str, tensor) -> dict[str, Any]:
    shape = list(tensor.shape)
    return {"source": source, "path": path, "shape": shape, "dtype": str(tensor.dtype)}


def exported(family: str, names: dict[str, Sequence[Piece]], left: dict, added) -> dict[str, Any]:
    """conversion.json of ours that become another library's: sources are our paths.

    left: our path -> why it stays behind; added: (their name, why) of what we have not.
    """
    return {
        "family": family,
        "mapped": [
            {"source": piece.place, "path": name, "shape": list(piece.slot)}
            for name, pieces in names.items()
            for piece in pieces
        ],
        "dropped": [{"key": path, "reason": why} for path, why in left.items()],
        "added": [{"key": name, "reason": why} for name, why in added],
        "missing": [],
        "unused": [],
    }


def _why(plan: Plan, path: str) -> str:
    return next((why for start, why in plan.fresh.items() if path.startswith(start)), "")


def check(report: dict) -> None:
    """UserError naming, by its source key, the first tensor that is missing or of no use."""
    for missing in report["missing"][:1]:
        raise UserError(
            f"{missing['key'] or 'a tensor'} is missing, for {missing['path']} "
            f"({len(report['missing'])} in all); give a file that is whole, or another --family"
        )
    for key in report["unused"][:1]:
        raise UserError(
            f"{key} is not used: {report['family']} has no such tensor "
            f"({len(report['unused'])} in all); give another file, or another --family"
        )


def table(report: dict) -> str:
    """What became of every tensor, a line each."""
    rows = [(m["source"], "mapped", f"{m['path']} {tuple(m['shape'])}") for m in report["mapped"]]
    rows += [(d["key"], "dropped", d["reason"]) for d in report["dropped"]]
    rows += [
        ("-", "initialised", f"{i['path']}: {i['reason']}") for i in report.get("initialised", ())
    ]
    rows += [(a["key"], "added", a["reason"]) for a in report.get("added", ())]
    rows += [(m["key"] or "?", "missing", m["path"]) for m in report["missing"]]
    rows += [(key, "unused", "") for key in report["unused"]]
    wide = max((len(row[0]) for row in rows), default=0)
    lines = [f"{key:{wide}}  {what:11}  {rest}".rstrip() for key, what, rest in rows]
    counts = ", ".join(f"{len(v)} {k}" for k, v in report.items() if isinstance(v, list))
    return "\n".join((*lines, f"{report['family']}: {counts}"))
