"""Block masks over a patch grid (BEiT, data2vec vision), drawn on the host."""

import math

import numpy as np

_ATTEMPTS = 10


def block_mask(
    rng: np.random.Generator,
    grid: int | tuple[int, int],
    num_masks: int,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
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

    Source: data2vec_vision, beit/masking_generator.py (the generator of BEiT, arXiv 2106.08254,
    algorithm 1).
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
    cells = np.unpackbits(bits, count=height * width, bitorder="little")
    return cells.reshape(height, width).astype(bool)


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
