"""Masks over a line of tokens or frames, drawn on the host: data2vec 1.0 text and speech.

True = masked everywhere. Counts are rounded at random, floor(x + U[0, 1)), so that they are x on
average, and differ between draws.
"""

import numpy as np


def text_spans(rng: np.random.Generator, size: int, ratio: float, span: int) -> np.ndarray:
    """Spans of tokens from uniform starts: bool [size].

    floor(ratio size / span + U[0, 1)) starts, distinct, over all positions; each masks `span`
    tokens, cut off at the end. Spans may overlap, so fewer than `ratio` of the tokens are masked:
    about 31 % at ratio 0.35 and span 4. A short text may get no mask at all.

    Source: fairseq `data/mask_tokens_dataset.py` with mask_multiple_length (data2vec,
    arXiv 2202.03555, section 4.3: the masking of wav2vec 2.0).
    """
    starts = rng.choice(size, _round(rng, ratio * size / span, size), replace=False)
    return _union(starts, size, span)


def bert_mask(
    rng: np.random.Generator, size: int, ratio: float, kept: float, randomized: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """BERT's corruption of single tokens: three arrays bool [size].

    Args:
      ratio: share of the tokens that are chosen; floor(ratio size + U[0, 1)) distinct ones are.
      kept: share of the chosen that keep their token, on average.
      randomized: share of the chosen that get a random token, on average.

    Returns:
      chosen: all positions drawn; the input is <mask> at chosen & ~kept & ~randomized.
      kept: those of them that stay as they are.
      randomized: those of them that get a random token, which the caller draws.

    Source: fairseq `data/mask_tokens_dataset.py` (BERT, arXiv 1810.04805, section 3.1).
    """
    chosen = np.zeros(size, bool)
    chosen[rng.choice(size, _round(rng, ratio * size, size), replace=False)] = True
    spared = kept + randomized
    if not spared:
        return chosen, np.zeros(size, bool), np.zeros(size, bool)
    changed = chosen & (rng.random(size) < spared)
    keep = rng.random(size) < kept / spared
    return chosen, changed & keep, changed & ~keep


def frame_spans(rng: np.random.Generator, frames: int, ratio: float, span: int) -> np.ndarray:
    """Spans of speech frames: bool [frames].

    k = max(1, floor(ratio frames / span + U[0, 1))) starts, distinct, from [0, frames - span);
    overlaps are allowed: about 48 % of 500 frames are masked at ratio 0.65 and span 10.

    Where fewer than k + 1 starts remain in so short a sound, they come from [0, k] and spans are
    cut off at the end, as in the reference. Where that masks every frame, which the reference
    refuses, one random frame stays visible.

    Source: fairseq `data/data_utils.py`, `compute_mask_indices`, mask_type static, min_masks 1
    (wav2vec 2.0, arXiv 2006.11477, section 3.1).
    """
    if frames < 1:
        return np.zeros(0, bool)
    count = max(1, _round(rng, ratio * frames / span, frames))
    starts = rng.choice(max(frames - span, count + 1), count, replace=False)
    mask = _union(starts, frames, span)
    if mask.all():
        mask[rng.integers(frames)] = False
    return mask


def _round(rng: np.random.Generator, number: float, most: int) -> int:
    return min(int(number + rng.random()), most)


def _union(starts: np.ndarray, size: int, span: int) -> np.ndarray:
    covered = (starts[:, None] + np.arange(span)).reshape(-1)
    mask = np.zeros(size, bool)
    mask[covered[covered < size]] = True
    return mask
