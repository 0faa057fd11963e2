"""The things of a scene: what there is, how numbers are drawn, who lies where."""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from bivl.data.table import mixed

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "diamond", "ring", "cross", "star", "heart")
SIZES = ("small", "medium", "large")
SIDES = ("left", "right", "above", "below")
Pair = tuple[int, int]  # numbers in COLOURS and SHAPES
_ALL = [(colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES))]
# Each colour and each shape lacks one partner.
HELD_OUT = tuple((c, s) for c, s in _ALL if s == (3 * c + 2) % 8)
SEEN = tuple(pair for pair in _ALL if pair not in HELD_OUT)
_CONTAINERS = [SHAPES.index(name) for name in ("circle", "square", "diamond", "ring", "heart")]
_CLEAR = 0.2  # of the side of the picture: nearer than that, nothing is left of or above another


class Draws:
    """An endless row of numbers that a seed (below 2^43) stands for, alike on every machine."""

    def __init__(self, seed: int):
        self._next, self._ready = seed * 2**20, []

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """In [low, high)."""
        if not self._ready:
            numbers = np.arange(32, dtype=np.uint64) + np.uint64(self._next)
            self._ready = (mixed(numbers) >> np.uint64(11)).tolist()  # 53 bits: exact in a float
            self._next += 32
        return low + (high - low) * (self._ready.pop() * 2.0**-53)

    def below(self, count: int) -> int:
        """A whole number from 0 to count - 1."""
        return int(self.uniform() * count)

    def one(self, choices: Sequence):
        """One of the choices."""
        return choices[self.below(len(choices))]

    def shuffled(self, choices: Iterable) -> list:
        """The choices in any order."""
        rest = list(choices)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]


@dataclasses.dataclass(frozen=True)
class Thing:
    """A shape in a picture whose sides are 1: x to the right, y down, both at its middle.

    colour, shape, size: numbers in COLOURS, SHAPES and SIZES.
    inside: whether it lies in front of another thing, at the same place.
    """

    colour: int
    shape: int
    size: int
    x: float
    y: float
    inside: bool = False

    @property
    def pair(self) -> tuple[int, int]:
        """(colour, shape), by which it is told from the others of its scene."""
        return self.colour, self.shape

    @property
    def name(self) -> str:
        """Its colour and shape: "red star"."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"

    @property
    def new(self) -> str:
        """As it is named first: "a small red star"."""
        return f"a {SIZES[self.size]} {self.name}"


def relation(one: Thing, other: Thing) -> str | None:
    """Where one is as seen from the other: inside or one of SIDES; None where it is not clear."""
    x, y = one.x - other.x, one.y - other.y
    if not (x or y):
        return "inside" if one.inside else None
    if abs(x) >= max(_CLEAR, 2 * abs(y)):
        return "right" if x > 0 else "left"
    if abs(y) >= max(_CLEAR, 2 * abs(x)):
        return "below" if y > 0 else "above"
    return None


def draw_pairs(
    draws: Draws,
    count: int,
    first: Pair,
    absent: Pair | None,
    attribute: int | None = None,
    alike: int = 0,
    lured: Pair | None = None,
) -> list[Pair]:
    """Colours and shapes of `count` things, no pair twice, none but the first held out.

    Args:
      first: the pair of the first thing.
      absent: the pair that no thing has.
      attribute: 0, colour, or 1, shape: `alike` things have that of the first, the others another;
        with 0 alike none has that of `absent`.
      lured: a pair with whose colour and shape others are likely to come.
    """
    pairs = [first]
    lures = [k for k in draws.shuffled((0, 1)) if draws.below(4)] if lured else []
    while len(pairs) < count:
        pair = draws.one(SEEN)
        if attribute is not None and alike:
            fits = (pair[attribute] == first[attribute]) == (len(pairs) < alike)
        else:
            fits = attribute is None or pair[attribute] != (absent or first)[attribute]
        if lured and len(pairs) <= len(lures):
            k = lures[len(pairs) - 1]
            fits = fits and pair[k] == lured[k]
        if fits and pair != absent and pair not in pairs:
            pairs.append(pair)
    return pairs


def draw_things(
    draws: Draws, pairs: Sequence[Pair], size: int | None, largest: bool, apart: bool
) -> list[Thing]:
    """Sizes and places for colours and shapes; one thing is the largest.

    Args:
      size: the number in SIZES of the first thing, None for any.
      largest: whether the first is the largest.
      apart: whether no thing may lie inside another.
    """
    sizes: list[int] = []
    while not sizes or sizes.count(max(sizes)) > 1 or (largest and sizes[0] < max(sizes)):
        sizes = [draws.below(3) for _ in pairs]
        sizes[0] = sizes[0] if size is None else size
    inner = None if apart else _inner(draws, pairs, sizes)
    outer = sizes.index(max(sizes))
    places = iter(_places(draws, len(pairs) - (inner is not None)))
    at = [(0.0, 0.0) if k == inner else next(places) for k in range(len(pairs))]
    if inner is not None:
        at[inner] = at[outer]
    return [
        Thing(*pair, size, *place, inside=k == inner)
        for k, (pair, size, place) in enumerate(zip(pairs, sizes, at, strict=True))
    ]


def _inner(draws: Draws, pairs: Sequence[Pair], sizes: list[int]) -> int | None:
    """The number of a thing that is put inside the largest, where one fits, in half the cases."""
    outer = sizes.index(max(sizes))
    fit = [k for k, pair in enumerate(pairs) if not sizes[k] and pair[0] != pairs[outer][0]]
    if sizes[outer] < len(SIZES) - 1 or pairs[outer][1] not in _CONTAINERS or not fit:
        return None
    return draws.one(fit) if draws.below(2) else None


def _places(draws: Draws, count: int) -> list[tuple[float, float]]:
    """Middles of things: one of nine places; a row or column of two; corners of a square."""
    if count == 1:
        places = [(0.25 + 0.25 * draws.below(3), 0.25 + 0.25 * draws.below(3))]
    elif count == 2:
        across = draws.uniform(0.27, 0.73)
        places = [(0.26, across), (0.74, across)]
        if draws.below(2):
            places = [(y, x) for x, y in places]
    else:
        places = [(x, y) for x in (0.26, 0.74) for y in (0.26, 0.74)]
    places = draws.shuffled(places)[:count]
    return [(x + draws.uniform(-0.04, 0.04), y + draws.uniform(-0.04, 0.04)) for x, y in places]
