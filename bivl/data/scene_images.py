"""Pictures of scenes: shapes with soft edges on textured grounds.

Only additions, products, square roots and comparisons, element by element: these round alike
everywhere, so a scene has the same pixels on every machine.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from bivl.data.scene_words import COLOURS, GROUNDS, SHAPES, SIZES, Draws, Thing
from bivl.data.table import mixed

RADII = dict(zip(SIZES, (0.09, 0.135, 0.19), strict=True))  # of the side of the picture
_RGB = {
    "red": (205, 32, 38), "orange": (243, 134, 26), "yellow": (246, 226, 60),
    "green": (28, 148, 56), "blue": (36, 76, 214), "purple": (142, 44, 168),
    "white": (248, 248, 248), "black": (14, 14, 14),
}  # fmt: skip
# The five half-planes whose edges draw a pentagram: cosines and sines of their directions.
_FIFTHS = (
    (0.0, -1.0), (0.951057, -0.309017), (0.587785, 0.809017),
    (-0.587785, 0.809017), (-0.951057, -0.309017),
)  # fmt: skip


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A pentagram is where at most one of the half-planes through its edges is left.
    first = second = np.full((1, 1), -9, np.float32)
    for cosine, sine in _FIFTHS:
        value = np.float32(cosine) * x - np.float32(sine) * y
        first, second = np.maximum(first, value), np.maximum(second, np.minimum(first, value))
    return second - np.float32(0.4)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = abs(x)
    corner = (x + abs(y - 0.1) - 0.85) * 0.7071
    return np.minimum(corner, np.sqrt((x - 0.425) ** 2 + (y + 0.325) ** 2) - 0.601)


# (x, y) -> how far outside a point lies, negative inside, in units of the radius.
_OUTSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.sqrt(x * x + y * y) - 0.95,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.82,
    "triangle": lambda x, y: np.maximum(y - 0.8, (2 * abs(x) - y - 1) * 0.4472),
    "diamond": lambda x, y: (1.5 * abs(x) + abs(y) - 1.1) * 0.5547,
    "ring": lambda x, y: abs(np.sqrt(x * x + y * y) - 0.79) - 0.2,
    "cross": lambda x, y: np.maximum(
        np.minimum(abs(x), abs(y)) - 0.31, np.maximum(abs(x), abs(y)) - 0.95
    ),
    "star": _star,
    "heart": _heart,
}


def render(things: Sequence[Thing], ground: int, size: int, draws: Draws) -> np.ndarray:
    """The picture, uint8 [size, size, 3]; a thing that lies inside another is drawn last."""
    image = _ground(GROUNDS[ground], size, draws)
    for thing in sorted(things, key=lambda thing: thing.inside):
        radius = RADII[SIZES[thing.size]] * draws.uniform(0.95, 1.05)
        rgb = [level + draws.uniform(-8, 8) for level in _RGB[COLOURS[thing.colour]]]
        # Only the pixels that the thing can touch.
        first_x, last_x, x = _span(thing.x, radius, size)
        first_y, last_y, y = _span(thing.y, radius, size)
        part = image[first_y:last_y, first_x:last_x]
        outside = _OUTSIDE[SHAPES[thing.shape]](x[None, :], y[:, None])
        cover = np.clip(np.float32(0.5) - outside * np.float32(radius * size), 0, 1)[..., None]
        part += cover * (np.float32(rgb) - part)
    return np.clip(image + np.float32(0.5), 0, 255).astype(np.uint8)


def _span(centre: float, radius: float, size: int) -> tuple[int, int, np.ndarray]:
    """The first pixel, the one behind the last, and their distances in radii from the centre."""
    first = max(0, int((centre - 1.1 * radius) * size) - 1)
    last = min(size, int((centre + 1.1 * radius) * size) + 2)
    line = (np.arange(first, last, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return first, last, (line - np.float32(centre)) / np.float32(radius)


def _ground(texture: str, size: int, draws: Draws) -> np.ndarray:
    """Two muted greys mixed by a texture, brighter towards one side; float32 [size, size, 3]."""
    x, y = _coordinates(size)
    grey, contrast = draws.uniform(112, 148), draws.uniform(12, 24) * draws.one((-1, 1))
    dark = np.float32([grey + draws.uniform(-16, 16) for _ in range(3)])
    light = np.float32([contrast + draws.uniform(-8, 8) for _ in range(3)])
    shade = np.float32(draws.uniform(-16, 16)) * x + np.float32(draws.uniform(-16, 16)) * y
    pattern = _texture(texture, x, y, size, draws)
    return dark + light * pattern[..., None] + shade[..., None]


def _texture(name: str, x: np.ndarray, y: np.ndarray, size: int, draws: Draws) -> np.ndarray:
    """[size, size] from -1 to 1."""
    period = draws.uniform(0.11, 0.18)
    shift_x, shift_y = draws.uniform(), draws.uniform()
    if name == "plain":
        return np.zeros((size, size), np.float32)
    if name == "speckled":
        cells = 32
        seed = draws.below(2**32) * cells * cells
        grain = mixed(np.arange(cells * cells, dtype=np.uint64) + np.uint64(seed))
        grain = (grain >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - 1
        row = np.arange(size) * cells // size
        return grain.reshape(cells, cells)[row[:, None], row[None, :]]
    if name == "striped":
        along = draws.one((x, y, (x + y) * np.float32(0.7071), (x - y) * np.float32(0.7071)))
        return np.broadcast_to(_wave(along, period, shift_x, size), (size, size))
    if name == "checked":
        return _wave(x, 1.3 * period, shift_x, size) * _wave(y, 1.3 * period, shift_y, size)
    x, y = ((_cycle(v, period, s) * np.float32(period)) for v, s in ((x, shift_x), (y, shift_y)))
    dots = np.float32(0.3 * period) - np.sqrt(x * x + y * y)
    return np.clip(2 * dots * np.float32(size), -1, 1)


def _cycle(line: np.ndarray, period: float, shift: float) -> np.ndarray:
    """The place in a cycle, from -0.5 to 0.5."""
    cycle = line / np.float32(period) + np.float32(8 + shift)  # 8: so that all are positive
    return cycle - np.floor(cycle) - np.float32(0.5)


def _wave(line: np.ndarray, period: float, shift: float, size: int) -> np.ndarray:
    """Bands of -1 and 1 with soft edges."""
    distance = (np.float32(0.25) - abs(_cycle(line, period, shift))) * np.float32(period * size)
    return np.clip(2 * distance, -1, 1)


@functools.lru_cache
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x [1, size] and y [size, 1] in (0, 1)."""
    line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)
    return line[None, :], line[:, None]
