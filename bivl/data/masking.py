"""Masks over a grid of positions, drawn on the host: BEiT's blocks and data2vec 2.0's samplers.

A sampler is a function rng -> dict of arrays of fixed shapes: `mask` bool [L] for one mask an
example; or, for M clones with equal counts, `mask` bool [M, L] and `keep` int32 [M, K], the kept
positions in order. True = masked everywhere.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.table import refuse_name

_ATTEMPTS = 10


def block_mask(
    rng: np.random.Generator,
    grid: int | tuple[int, int],
    num_masks: int,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
    exact: bool = False,
) -> np.ndarray:
    """Blockwise mask: bool [h, w], True = masked, at most `num_masks` True cells.

    Blocks of random area and aspect ratio are added until `num_masks` cells are masked or ten
    attempts in a row bring nothing new that fits. The count may therefore fall short: at 120 cells
    on 14x14 about 31 % of the draws do, with a mean of 119.5. A block is always smaller than the
    grid in both directions, which makes the centre more likely than the rim.

    Args:
      rng: source of randomness.
      grid: (h, w) in patches, or one number for a square.
      num_masks: cells wanted, 0 <= num_masks <= h * w.
      min_block: smallest area drawn, in cells. It is made for 14x14: on a small grid choose a
        smaller one, or most blocks will not fit.
      max_block: largest area drawn, None for no limit but the cells that are still missing.
      min_aspect: height / width is log-uniform in [min_aspect, 1 / min_aspect].
      exact: where blocks fall short, single cells drawn uniformly make up `num_masks`.

    Source: data2vec_vision, beit/masking_generator.py (the generator of BEiT, arXiv 2106.08254,
    algorithm 1); `exact` is the generator of BEiT v2 (microsoft/unilm, beit2/).
    """
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if not 0 <= num_masks <= height * width:
        raise ValueError(
            f"num_masks={num_masks} must lie in 0..{height * width} ({height}x{width})"
        )
    max_block = num_masks if max_block is None else max_block
    log_aspect = math.log(min_aspect)

    # The mask is one whole number, bit y * width + x = cell (y, x): counting the new cells of a
    # block is then one AND and one popcount, several times faster than slices of a small array.
    mask, count = 0, 0
    while count < num_masks:
        block = _new_block(
            rng, mask, height, width, num_masks - count, min_block, max_block, log_aspect
        )
        if block is None:
            break
        mask |= block
        count = mask.bit_count()
    bits = np.frombuffer(mask.to_bytes((height * width + 7) // 8, "little"), np.uint8)
    cells = np.unpackbits(bits, count=height * width, bitorder="little").astype(bool)
    if exact and count < num_masks:
        cells[rng.choice(np.flatnonzero(~cells), num_masks - count, replace=False)] = True
    return cells.reshape(height, width)


def _new_block(rng, mask, height, width, missing, min_block, max_block, log_aspect):
    """A block with 1..cap cells that are not in `mask` yet, or None after ten attempts."""
    cap = min(missing, max_block)
    draws = rng.random((_ATTEMPTS, 4)).tolist()
    for for_area, for_aspect, for_top, for_left in draws:
        # The bounds are reversed when cap < min_block; the reference draws in between all the same.
        area = min_block + (cap - min_block) * for_area
        aspect = math.exp(log_aspect * (1 - 2 * for_aspect))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (h < height and w < width):
            continue
        top, left = int(for_top * (height - h + 1)), int(for_left * (width - w + 1))
        row = ((1 << w) - 1) << left
        block = 0
        for y in range(top, top + h):
            block |= row << (y * width)
        if 0 < (block & ~mask).bit_count() <= cap:
            return block
    return None


def inverse_block_mask(
    rng: np.random.Generator,
    grid: tuple[int, ...],
    mask_ratio: float,
    block: int,
    adjust: float,
    inverse: bool = True,
) -> np.ndarray:
    """Blocks round random centres mark what is kept (`inverse`) or masked: bool [T], True = masked.

    floor(T (q + adjust) / block^n) centres, uniform with replacement, q being the share to mark;
    each marks block^n cells, coordinates clamped to the n-dimensional grid. Then random cells are
    unmarked or marked until exactly floor(T q) are, so that every mask of a config has the same
    count.

    Source: fairseq `data/data_utils.py`, `compute_block_mask_2d` and `compute_block_mask_1d`
    (data2vec 2.0, arXiv 2212.07525, section 3.2). The paper divides by `block`, the code by
    block^n.
    """
    total = math.prod(grid)
    share = 1 - mask_ratio if inverse else mask_ratio
    wanted = int(total * share)
    centres = rng.integers(0, total, int(total * (share + adjust) / block ** len(grid)))
    marked = np.zeros(total, bool)
    marked[_blocks(tuple(grid), block)[centres]] = True
    surplus = np.count_nonzero(marked) - wanted
    if surplus:
        (cells,) = (marked if surplus > 0 else ~marked).nonzero()
        marked[rng.choice(cells, abs(surplus), replace=False)] = surplus < 0
    return ~marked if inverse else marked


@functools.lru_cache
def _blocks(grid: tuple[int, ...], block: int) -> np.ndarray:
    """int [T, block^n]: the cells of the block round each cell, coordinates clamped to the grid."""
    offsets = np.arange(block) - block // 2
    lines = [np.clip(np.arange(size)[:, None] + offsets, 0, size - 1) for size in grid]
    cells = np.zeros((1, 1), int)
    for line, size in zip(lines, grid, strict=True):
        cells = cells[:, None, :, None] * size + line[:, None, :]
        cells = cells.reshape(cells.shape[0] * cells.shape[1], -1)
    return cells


def random_mask(rng: np.random.Generator, total: int, mask_ratio: float) -> np.ndarray:
    """bool [T], True = masked: the floor(T (1 - mask_ratio)) smallest of T uniform numbers are kept
    (fairseq `models/modalities/base.py`, `random_masking`)."""
    mask = np.ones(total, bool)
    mask[np.argsort(rng.random(total), kind="stable")[: int(total * (1 - mask_ratio))]] = False
    return mask


def block_count(ratio: float, grid) -> int:
    """How many positions a block mask hides at most: round(ratio L), at least one."""
    return max(1, round(ratio * math.prod(grid)))


def block_sampler(ratio: float, grid, min_block: int, exact: bool = False) -> Callable:
    """One BEiT block mask an example, of at most (`exact`: of) `block_count` positions."""
    count = block_count(ratio, grid)
    draw = lambda rng: block_mask(rng, grid, count, min_block, exact=exact)  # noqa: E731
    return lambda rng: {"mask": draw(rng).reshape(-1)}


def inverse_block_sampler(
    ratio: float, grid, num_masks: int, block: int, adjust: float, inverse: bool = True
) -> Callable:
    """`num_masks` inverse block masks an example."""
    draw = lambda rng: inverse_block_mask(rng, grid, ratio, block, adjust, inverse)  # noqa: E731
    return lambda rng: _clones([draw(rng) for _ in range(num_masks)])


def random_sampler(ratio: float, grid, num_masks: int) -> Callable:
    """`num_masks` uniform masks an example."""
    total = math.prod(grid)
    return lambda rng: _clones([random_mask(rng, total, ratio) for _ in range(num_masks)])


def _clones(masks: list[np.ndarray]) -> dict[str, np.ndarray]:
    keep = np.array([(~mask).nonzero()[0] for mask in masks], np.int32)
    return {"mask": np.array(masks), "keep": keep}


SAMPLERS: dict[str, Callable] = {
    "block": block_sampler,
    "inverse_block": inverse_block_sampler,
    "random": random_sampler,
}


def configured(make: Callable, config: Any, *arguments: Any) -> Callable:
    """make(config.mask_ratio, *arguments, ...) with the settings of config.masking but its kind."""
    if not 0 < config.mask_ratio < 1:
        raise UserError(f"config.mask_ratio={config.mask_ratio} must lie between 0 and 1")
    settings = {key: value for key, value in dict(config.masking).items() if key != "kind"}
    try:
        return make(config.mask_ratio, *arguments, **settings)
    except TypeError as error:  # a setting of another kind, or one that is missing
        raise UserError(
            f"config.masking={dict(config.masking)}: {error}; give it the settings of its kind"
        ) from error


def sampler(config: Any, grid: tuple[int, ...]) -> Callable:
    """The sampler over `grid` that config.masking and mask_ratio describe."""
    if config.masking.kind not in SAMPLERS:
        refuse_name("config.masking.kind", config.masking.kind, SAMPLERS)
    return configured(SAMPLERS[config.masking.kind], config, grid)
