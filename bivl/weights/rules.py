"""Rule tables: names and layouts of foreign tensors <-> our parameters, one table for both ways.

A family writes its checkpoint format as an ordered table of `Rule`s; nothing is coded per tensor.
Our blocks are stored stacked, [N, ...], so most paths have a slot: `trunk/blocks/norm1/scale[n]`.
A rule with its numbers put in is a `Piece`; what is done with pieces is in `weights/matching.py`.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from bivl.weights.transforms import TRANSFORMS, Shape

_NUMBER = r"(\d{1,4})"


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a table: what becomes of the tensors that `pattern` names.

    pattern: a source name; `{n}` is a number (any word does, `{n<2}` bounds it), `*` anything. An
      ending `[k/m]` takes the k-th of m equal parts of the first axis, of a fused q, k, v, say.
    path: our parameter, where `{n}` or `{n-1}` is a number of the pattern, with an optional slot
      such as `[n]`, `[n+2,:,0]`. A leading `+`: added to what other rules put there.
    transform: a key of TRANSFORMS, how the tensor is laid out there and here.
    drop: why the tensor has no place here; `path` is empty then.
    """

    pattern: str
    path: str = ""
    transform: str = ""
    drop: str = ""


def under(prefix: str, table: Iterable[Rule]) -> tuple[Rule, ...]:
    """The table with `prefix` before every pattern."""
    return tuple(dataclasses.replace(rule, pattern=f"{prefix}{rule.pattern}") for rule in table)


def moved(old: str, new: str, table: Iterable[Rule]) -> tuple[Rule, ...]:
    """The table with `new` for the start `old` of its paths."""
    return tuple(
        dataclasses.replace(rule, path=f"{new}{rule.path.removeprefix(old)}")
        if rule.path.startswith(old)
        else rule
        for rule in table
    )


def pair(source: str, path: str, transform: str = "linear") -> tuple[Rule, Rule]:
    """A map with bias: `source.weight`, `source.bias` -> `path/kernel`, `path/bias`.

    A slot stands at the end of `path`: `mlp/fc1[n]`.
    """
    path, bracket, slot = path.partition("[")
    return (
        Rule(f"{source}.weight", f"{path}/kernel{bracket}{slot}", transform),
        Rule(f"{source}.bias", f"{path}/bias{bracket}{slot}"),
    )


def norm(source: str, path: str) -> tuple[Rule, Rule]:
    """A LayerNorm: `source.weight`, `source.bias` -> `path/scale`, `path/bias`."""
    path, bracket, slot = path.partition("[")
    return (
        Rule(f"{source}.weight", f"{path}/scale{bracket}{slot}"),
        Rule(f"{source}.bias", f"{path}/bias{bracket}{slot}"),
    )


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A rule taken apart."""

    rule: Rule
    stem: str
    part: tuple[int, int]  # the k-th of m; (0, 1) is all
    bounds: dict[str, int]
    source: re.Pattern
    head: str
    slot: tuple[str, ...]
    added: bool


@functools.lru_cache(4096)
def compiled(rule: Rule) -> Compiled:
    found = re.fullmatch(r"(.*?)(?:\[(\d+)/(\d+)\])?", rule.pattern)
    stem, part = found[1], (int(found[2] or 0), int(found[3] or 1))
    bounds = {name: int(most) for name, most in re.findall(r"\{(\w+)<(\d+)\}", stem)}
    stem, seen, regex = re.sub(r"<\d+\}", "}", stem), set(), ""
    for piece in re.split(r"(\{\w+\}|\*)", stem):
        name = piece[1:-1]
        if piece == "*":
            regex += ".*"
        elif piece.startswith("{"):
            regex += rf"(?P={name})" if name in seen else rf"(?P<{name}>\d{{1,4}})"
            seen.add(name)
        else:
            regex += re.escape(piece)
    head, _, slot = rule.path.lstrip("+").partition("[")
    terms = tuple(filter(None, slot.rstrip("]").split(",")))
    added = rule.path.startswith("+")
    return Compiled(rule, stem, part, bounds, re.compile(regex, re.DOTALL), head, terms, added)


def _term(text: str) -> tuple[str, int]:
    """`n`, `n+2`, `n-1` -> the name and what is added to it."""
    name, sign, offset = re.fullmatch(r"(\w+?)(?:([+-])(\d+))?", text).groups()
    return name, int(f"{sign}{offset}") if sign else 0


def _index(term: str, numbers: Mapping[str, int]) -> int | slice:
    if term == ":":
        return slice(None)
    if term.isdecimal():
        return int(term)
    name, offset = _term(term)
    return numbers[name] + offset


@dataclasses.dataclass(frozen=True)
class Piece:
    """A source tensor, or one part of it, and the slot of ours that it fills."""

    source: str
    part: tuple[int, int]
    path: str
    index: tuple
    slot: Shape
    transform: str
    added: bool = False

    @property
    def place(self) -> str:
        """The path with its slot, as in the table."""
        terms = ",".join(":" if isinstance(i, slice) else str(i) for i in self.index)
        return f"{self.path}[{terms}]" if terms else self.path

    @property
    def wanted(self) -> Shape:
        """The shape that the source tensor must have."""
        zeros = np.broadcast_to(np.float32(0), self.slot)
        shape = TRANSFORMS[self.transform].theirs(zeros).shape
        return (shape[0] * self.part[1], *shape[1:]) if shape else ()

    def fits(self, shape: Shape) -> bool:
        """Whether a source tensor of this shape can fill the slot."""
        resizable = TRANSFORMS[self.transform].fits
        return resizable(shape, self.slot) if resizable else shape == self.wanted

    def of(self, tensor: np.ndarray) -> np.ndarray:
        """The source tensor -> what fills the slot."""
        k, m = self.part
        if m > 1:
            rows = len(tensor) // m
            tensor = tensor[k * rows : (k + 1) * rows]
        return TRANSFORMS[self.transform].ours(tensor, self.slot)


def piece_of(c: Compiled, source: str, numbers: dict, ours: Mapping[str, Shape]) -> Piece | None:
    """The piece that a rule makes with these numbers; None where our model has no such slot."""
    fill = lambda found: str(_index(found[1], numbers))  # noqa: E731
    path = re.sub(r"\{([^}]+)\}", fill, c.head)
    if path not in ours or any(numbers[name] >= most for name, most in c.bounds.items()):
        return None
    shape, index = ours[path], tuple(_index(term, numbers) for term in c.slot)
    if len(index) > len(shape):
        return None
    pairs = tuple(zip(index, shape, strict=False))
    if any(not isinstance(i, slice) and not 0 <= i < size for i, size in pairs):
        return None
    slot = tuple(size for i, size in pairs if isinstance(i, slice)) + shape[len(index) :]
    return Piece(source, c.part, path, index, slot, c.rule.transform, c.added)


def places(table: Iterable[Rule], ours: Mapping[str, Shape]) -> Iterator[Piece]:
    """Every piece that the table would fill `ours` with, in the table's order.

    Where rules are alternatives for one slot, the first of them stands for all.
    """
    taken = set()
    for c in map(compiled, table):
        if c.rule.drop:
            continue
        for numbers in _bindings(c, ours):
            piece = piece_of(c, c.stem.format(**numbers), numbers, ours)
            key = piece and (piece.place, piece.source if piece.added else "")
            if piece and key not in taken:
                taken.add(key)
                yield piece


def _bindings(c: Compiled, ours: Mapping[str, Shape]) -> Iterator[dict[str, int]]:
    """All numbers with which a rule's path may be one of ours."""
    terms = [_term(text) for text in re.findall(r"\{([^}]+)\}", c.head)]
    regex = "".join(
        _NUMBER if piece.startswith("{") else re.escape(piece)
        for piece in re.split(r"(\{[^}]+\})", c.head)
    )
    found = ((path, re.fullmatch(regex, path)) for path in ours) if terms else ((c.head, None),)
    for path, numbers in found:
        if path not in ours or (terms and not numbers):
            continue
        fixed = {
            name: int(text) - offset
            for (name, offset), text in zip(terms, numbers.groups() if numbers else (), strict=True)
        }
        free = [
            (*_term(term), size)
            for term, size in zip(c.slot, ours[path], strict=False)
            if not (term == ":" or term.isdecimal())
        ]
        ranges = [range(max(0, -offset), max(0, size - offset)) for _, offset, size in free]
        for chosen in itertools.product(*ranges):
            yield fixed | {name: n for (name, *_), n in zip(free, chosen, strict=True)}
