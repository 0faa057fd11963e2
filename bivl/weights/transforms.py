"""How tensors are laid out elsewhere and here: named pairs of functions, each other's inverse.

A rule table names them (`weights/rules.py`). No value changes on either way, unless a table of
positions is resized.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """A layout and its inverse; both keep every value, but where shapes may differ."""

    ours: Callable[[np.ndarray, Shape], np.ndarray]
    """(source tensor, shape of our slot) -> our slot."""
    theirs: Callable[[np.ndarray], np.ndarray]
    """Our slot -> source tensor."""
    fits: Callable[[Shape, Shape], bool] | None = None
    """(shape of the source tensor, of our slot) -> whether the one can be made the other; None:
    only a tensor as `theirs` makes it."""


LEADING = 3  # rows of BEiT-3's table of image positions: two that nothing reads, and CLS


def bicubic(old: int, new: int) -> np.ndarray:
    """[new, old], cubic convolution with a = -0.75 along one axis: PyTorch's `interpolate` with
    `bicubic`, without align_corners and antialias."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        x, a = np.abs(centre - (first + tap)), -0.75
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        place = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), place), np.where(x <= 1, near, far))
    return matrix


def _side(rows: int) -> int:
    """Patches down and across of a table of positions; 0 where it is of no square grid."""
    side = math.isqrt(max(rows - LEADING, 0))
    return side if side * side == rows - LEADING else 0


def resized(x: np.ndarray, shape: Shape) -> np.ndarray:
    """Positions [LEADING + h h, D] for another grid: the leading rows stay, the others are resized
    (BEiT-3's `utils.py`, load_model_and_may_interpolate)."""
    if x.shape == shape:
        return x
    x, old, new = x.astype(np.float64), _side(len(x)), _side(shape[0])
    along, grid = bicubic(old, new), x[LEADING:].reshape(old, old, -1)
    grid = np.einsum("ih,jw,hwd->ijd", along, along, grid)
    return np.concatenate([x[:LEADING], grid.reshape(new * new, -1)])


def _resizable(source: Shape, slot: Shape) -> bool:
    alike = len(source) == 2 and source[1:] == slot[1:]
    return source == slot or (alike and _side(source[0]) > 0 and _side(slot[0]) > 0)


def _with_unread(x: np.ndarray) -> np.ndarray:
    """[1, 1 + N, D] -> [LEADING + N, D]."""
    return np.concatenate([np.zeros_like(x[0, : LEADING - 1]), x[0]])


# PyTorch's Linear is [out, in], its convolution [out, in, k...]; our kernels are [in..., out...].
TRANSFORMS: dict[str, Transform] = {
    "": Transform(lambda x, shape: x, lambda y: y),
    "linear": Transform(lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(len(y), -1).T),
    # From heads: [H, d, D]. `linear` is also to heads, [D, H, d], or to q, k and v [D, 3, H, d].
    "merge": Transform(lambda x, shape: x.T.reshape(shape), lambda y: y.reshape(-1, y.shape[-1]).T),
    "convolution": Transform(
        lambda x, shape: np.moveaxis(x, (0, 1), (-1, -2)),
        lambda y: np.moveaxis(y, (-1, -2), (0, 1)),
    ),
    "pointwise": Transform(  # a convolution of one place is a linear map of channels
        lambda x, shape: x[:, :, 0, 0].T, lambda y: y.T[:, :, None, None]
    ),
    "flat": Transform(lambda x, shape: x.reshape(shape), lambda y: y.reshape(-1)),
    "batched": Transform(lambda x, shape: x[0], lambda y: y[None]),
    "alibi": Transform(lambda x, shape: x.reshape(shape), lambda y: y.reshape(1, 1, -1, 1, 1)),
    "old_alibi": Transform(lambda x, shape: x.reshape(shape), lambda y: y.reshape(1, -1, 1, 1)),
    # One row that all of ours share: it is added, and comes back as zeros.
    "every_row": Transform(np.broadcast_to, lambda y: np.zeros_like(y[:1])),
    "positions": Transform(resized, lambda y: y, _resizable),
    # The same without the rows that nothing reads: timm's.
    "read_positions": Transform(
        lambda x, shape: resized(_with_unread(x), shape),
        lambda y: y[None, LEADING - 1 :],
        lambda source, slot: len(source) == 3 and _resizable((source[1] + 2, source[2]), slot),
    ),
}
