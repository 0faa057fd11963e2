"""Official weights on their way to one of our models: recognised, compared, read."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import traverse_util

from bivl.core.errors import UserError
from bivl.core.piecemeal import Deferred
from bivl.weights import matching, vocabularies
from bivl.weights import report as reports
from bivl.weights.files import open_weights

log = logging.getLogger("bivl")


def recognised(weights, family: str | None, families: Mapping) -> tuple[str, str, Any]:
    """(family, name of the layout, layout) of a file; UserError where none or several families
    know it."""
    if family and family not in families:
        raise UserError(f"--family={family} is unknown; use one of {sorted(families)}")
    found = {
        name: (name, stored, layout)
        for name, layouts in families.items()
        if family in (None, name)
        for stored, layout in layouts.items()
        if layout.recognise(weights, family is not None)
    }
    if len(found) == 1:
        return next(iter(found.values()))
    shown = ", ".join(list(weights.tensors)[:3])
    if found:
        raise UserError(
            f"these weights may be of {' or '.join(found)} ({shown}, ...); pass --family= with "
            "the one that they are of"
        )
    what = f"are not {family}'s" if family else "are of no known family"
    raise UserError(
        f"these weights {what} ({shown}, ...); give weights of one of {sorted(families)}"
    )


def shapes(objective) -> tuple[dict, dict]:
    """Path -> shape of an objective's parameters (extras under `extras/`), and of its teacher."""
    boxed = jax.eval_shape(lambda: objective.init(jax.random.key(0)))
    params, teacher, extras = nn.unbox(boxed)

    def flat(tree):
        leaves = traverse_util.flatten_dict(tree, sep="/").items()
        return {path: tuple(leaf.shape) for path, leaf in leaves}

    return flat(params | ({"extras": extras} if extras else {})), flat(teacher)


def initialised(objective, seed: int, paths) -> dict[str, Deferred]:
    """The parameters at `paths` as training initialises them."""

    def init():
        params, _, extras = nn.unbox(objective.init(jax.random.key(seed)))
        flat = traverse_util.flatten_dict(params | {"extras": extras}, sep="/")
        return {path: flat[path] for path in paths}

    made = {path: np.asarray(x) for path, x in jax.jit(init)().items()} if paths else {}
    return {path: Deferred(x.shape, x.dtype, lambda x=x: x) for path, x in made.items()}


@dataclasses.dataclass(frozen=True)
class Found:
    """A model, ours by path, and what is to be said of where it came from."""

    config: Any
    arrays: Mapping[str, Deferred]
    teacher: Mapping[str, Deferred]
    report: dict
    """conversion.json; empty for a checkpoint that was trained here."""
    kept: Mapping[str, Any]
    """Source name -> tensor that our model has no place for."""
    files: tuple[Path, ...]
    """Small files that come along: configs, vocabularies."""


class Official:
    """Official weights: opened, recognised and planned; no tensor is read before `read`."""

    def __init__(self, path: Path, part, family, families: Mapping, teacher: bool):
        """`families`: name -> layouts by name; `part`, `family`, `teacher` as the flags say."""
        self.weights = open_weights(path, part)
        self.folder = path if path.is_dir() else path.parent
        self.files = vocabularies.small(path)
        self.family, self.layout, layout = recognised(self.weights, family, families)
        self.plan = layout.plan(self.weights, self.folder)
        self.teacher = teacher
        if self.teacher and not self.plan.teacher:
            raise UserError("--teacher: the file has no averaged model; leave the flag out")

    def read(self, config, objective) -> Found:
        """What is to be read, once the table is complete; UserError names the first gap."""
        plan, (ours, teachers) = self.plan, shapes(objective)
        tensors = self.weights.tensors
        sources = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        averaged = matching.named(plan.teacher, sources) if self.teacher else set()
        own = {name: shape for name, shape in sources.items() if name not in averaged}
        found, aside = matching.match(plan.table, own, ours, tuple(plan.fresh)), matching.NOTHING
        if self.teacher:
            aside = matching.match(plan.teacher, {k: sources[k] for k in averaged}, teachers)
        fresh = sorted(set(ours) - {piece.path for piece in found.pieces})
        report = {"family": self.family, "layout": self.layout}
        report |= reports.imported(self.weights, plan, found, aside, fresh)
        print(reports.table(report))
        reports.check(report)
        arrays = matching.filled(found, tensors, ours)
        arrays |= initialised(objective, config.seed, fresh)
        teacher = matching.filled(aside, tensors, teachers)
        for note in plan.notes:
            log.warning("note: %s", note)
        return Found(config, arrays, teacher, report, self._kept(found), self.files)

    def _kept(self, found) -> dict:
        """What a model is given back with: dropped weights, and those that something was added to.
        What is computed and teachers stay behind."""
        behind = "computed here", "the teacher"
        added = {piece.path for piece in found.pieces if piece.added}
        dropped = (key for key, why in found.dropped if not any(word in why for word in behind))
        names = {key.partition("[")[0] for key in dropped}
        names |= {piece.source for piece in found.pieces if piece.path in added}
        tensors = self.weights.tensors
        return {name: tensors[name] for name in sorted(names)}
