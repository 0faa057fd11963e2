"""Where a token stands: relative position bias, ALiBi, fixed 2-D sin-cos and learned tables."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.models.layers import Vector, ones, spread, truncated_normal, zeros


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
    """Learned bias [1, H, L, L] added to attention logits; L = h w (+ 1 for CLS); zero at init.

    `layers`: each has a table of its own, [N, 1, H, L, L], as in models fine-tuned from BEiT.
    """

    grid: tuple[int, int]
    num_heads: int
    special: bool = True
    layers: int = 0

    @nn.compact
    def __call__(self):
        h, w = self.grid
        rows = (2 * h - 1) * (2 * w - 1) + 3 * self.special
        shape, axes = (rows, self.num_heads), (None, "heads")
        if self.layers:
            shape, axes = (self.layers, *shape), ("layers", *axes)
        table = jnp.swapaxes(Vector(shape, axes, zeros, name="table")(), -1, -2)
        bias = jnp.take(table, relative_index(self.grid, self.special), axis=-1)
        return jnp.expand_dims(bias, -4)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Slopes [H]: 2^(-8 k / H), k = 1..H, for H a power of two; else those of the power P below H,
    followed by every other one of 2 P (ALiBi, arXiv 2108.12409; fairseq `modalities/base.py`)."""
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between[: num_heads - power]]).astype(np.float32)


class Alibi(nn.Module):
    """places int [B, L] -> bias [B, H, L, L]: -slope_h |i - j| times a learned scale a head, no
    less than zero, one at init (data2vec 2.0's `alibi_scale`, shared by all layers)."""

    num_heads: int

    @nn.compact
    def __call__(self, places):
        scale = Vector((self.num_heads,), ("heads",), ones, name="scale")()
        factor = jnp.maximum(scale, 0) * alibi_slopes(self.num_heads)
        distance = jnp.abs(places[:, :, None] - places[:, None, :])
        return -factor[:, None, None] * distance[:, None].astype(jnp.float32)


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
        return x + spread(table, x)
