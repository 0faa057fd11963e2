"""Coloured shapes drawn from their index alone: images that need no files."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.table import Column, Table, mixed, setting, split_ranges

_COLOURS = {
    "red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (235, 210, 50),
    "white": (245, 245, 245), "black": (15, 15, 15),
}  # fmt: skip
_SHAPES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: x * x + y * y < 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.85,
    "triangle": lambda x, y: (y < 0.8) & (2 * abs(x) < y + 1),
    "diamond": lambda x, y: abs(x) + abs(y) < 1.1,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) < 0.25,
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.28) & (np.maximum(abs(x), abs(y)) < 1),
    "saltire": lambda x, y: (abs(abs(x) - abs(y)) < 0.35) & (np.maximum(abs(x), abs(y)) < 0.9),
    "bar": lambda x, y: (abs(y) < 0.3) & (abs(x) < 1),
    "pole": lambda x, y: (abs(x) < 0.3) & (abs(y) < 1),
    "half moon": lambda x, y: (x * x + y * y < 1) & ((x - 0.5) ** 2 + y * y > 0.6),
}


def shapes_table(config: Mapping[str, Any]) -> Table:
    """Coloured shapes made from the index: `num_examples` in the split, `image_size` pixels."""
    count, size = setting(config, "num_examples", 0), setting(config, "image_size", 32)
    sizes = {"train": count or 1024, "test": count or 256}
    if size < 1 or min(sizes.values()) < 1:
        raise UserError(
            f"data.image_size={size} and data.num_examples={count} must be positive; correct them"
        )
    ranges = split_ranges(setting(config, "split", "train"), sizes, "synthetic")
    # The splits differ in their seeds: test starts where no train set reaches.
    offset = {"train": 0, "test": 2**40}
    seeds = np.concatenate([np.arange(r.start, r.stop) + offset[name] for name, r in ranges])
    columns = {
        "image": Column("image"),
        "text": Column("text"),
        "label": Column("label", tuple(_SHAPES)),
    }
    return Table("synthetic", columns, lambda wanted: ShapeRows(seeds, int(size)))


@dataclasses.dataclass(frozen=True)
class ShapeRows:
    """A shape on a smooth gradient for each seed; the shape is the label, the text names both."""

    seeds: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = int(self.seeds[index])
        label, colour = seed % len(_SHAPES), list(_COLOURS)[(seed // len(_SHAPES)) % len(_COLOURS)]
        # Twelve numbers in [0, 1): two background colours, the gradient, the place and the radius.
        u = mixed(seed * 16 + np.arange(12)) / 2**64
        x, y = _coordinates(self.size)
        slope = (x * (u[6] - 0.5) + y * (u[7] - 0.5) + 0.5)[..., None]
        image = 60 + 135 * (u[0:3] + (u[3:6] - u[0:3]) * slope)
        radius = 0.3 + 0.3 * u[8]
        place = (u[9:11] * 2 - 1) * (1 - radius)
        inside = list(_SHAPES.values())[label]((x - place[0]) / radius, (y - place[1]) / radius)
        image[inside] = _COLOURS[colour]
        text = f"a {colour} {list(_SHAPES)[label]}"
        return {"image": image.astype(np.uint8), "text": text, "label": label}


@functools.lru_cache
def _coordinates(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y in [-1, 1], each [size, size]."""
    line = (np.arange(size) + 0.5) * (2 / size) - 1
    return line[None, :] * np.ones((size, 1)), line[:, None] * np.ones((1, size))
