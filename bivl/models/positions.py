"""Where a token stands: relative position bias, fixed 2-D sin-cos and learned tables."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.models.layers import Vector, truncated_normal, zeros


def relative_index(grid: tuple[int, int], special: bool = True) -> np.ndarray:
    """Rows of BEiT's bias table for every (query, key) of a grid: int [L, L].

    (yi - yj + h - 1) (2 w - 1) + (xi - xj + w - 1); with `special`, a leading CLS whose query row,
    key column and own entry take the three rows at the end (BEiT `modeling_finetune.py`).
    """
    h, w = grid
    y, x = np.divmod(np.arange(h * w), w)
    index = (y[:, None] - y + h - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)
    if not special:
        return index
    full = np.empty((h * w + 1, h * w + 1), index.dtype)
    rows = (2 * h - 1) * (2 * w - 1)
    full[1:, 1:], full[0, :], full[:, 0], full[0, 0] = index, rows, rows + 1, rows + 2
    return full


class RelativePositionBias(nn.Module):
    """Learned bias [1, H, L, L] added to attention logits; L = h w (+ 1 for CLS); zero at init."""

    grid: tuple[int, int]
    num_heads: int
    special: bool = True

    @nn.compact
    def __call__(self):
        h, w = self.grid
        rows = (2 * h - 1) * (2 * w - 1) + 3 * self.special
        table = Vector((rows, self.num_heads), (None, "heads"), zeros, name="table")()
        return jnp.take(table.T, relative_index(self.grid, self.special), axis=1)[None]


def sincos_2d(grid: tuple[int, int], width: int) -> np.ndarray:
    """Fixed positions [h w, D]: first half of D the column, second half the row.

    Each half is sin then cos of pos * 10000^(-j / (D / 4)) (MAE `util/pos_embed.py`).
    """
    omega = 10000.0 ** (-np.arange(width // 4) / (width / 4))
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    angles = [position[:, None] * omega for position in (x, y)]
    parts = [f(a) for a in angles for f in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


class LearnedPositions(nn.Module):
    """Learned absolute positions: adds [L, D] to [B, L, D]."""

    init: nn.initializers.Initializer = truncated_normal(0.02)

    @nn.compact
    def __call__(self, x):
        table = Vector(x.shape[-2:], (None, "embed"), self.init, name="table")()
        return x + table.astype(x.dtype)


def resize_grid(table: jax.Array, old: tuple[int, int], new: tuple[int, int]) -> jax.Array:
    """Bicubic resize of a position table [h w, D] to another grid."""
    image = jnp.asarray(table).reshape(*old, -1)
    resized = jax.image.resize(image, (*new, image.shape[-1]), "bicubic")
    return resized.reshape(new[0] * new[1], -1)
