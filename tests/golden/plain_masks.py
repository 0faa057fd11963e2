"""Masks of text and speech in plain Python and numpy: the rules bivl's own are checked against.

Written from the behaviour of fairseq (`fairseq/data/mask_tokens_dataset.py`,
`fairseq/data/data_utils.py`, `examples/data2vec/models/modalities/base.py` and
`examples/data2vec/data/modality.py`). In every mask True is hidden. One loop a rule, no tricks.
"""

import math

import numpy as np


def rounded(rng, value):
    """`value` rounded down or up by chance, so that its mean stays."""
    return math.floor(value + rng.random())


def text_spans(rng, size, ratio=0.35, span=4):
    """data2vec 1.0 text: distinct starts anywhere, each hides `span` tokens, cut at the end."""
    mask = np.zeros(size, bool)
    for start in rng.choice(size, rounded(rng, ratio * size / span), replace=False):
        for place in range(start, min(start + span, size)):
            mask[place] = True
    return mask


def bert(rng, size, ratio=0.15, kept=0.1, randomized=0.1):
    """Chosen tokens (for the loss), and those of them left as they are, and made random.

    What is chosen and neither becomes the mask token.
    """
    mask, same, random = (np.zeros(size, bool) for _ in range(3))
    for place in rng.choice(size, rounded(rng, ratio * size), replace=False):
        draw = rng.random()
        mask[place] = True
        same[place] = draw < kept
        random[place] = kept <= draw < kept + randomized
    return mask, same, random


def frame_spans(rng, frames, ratio=0.65, span=10):
    """data2vec 1.0 audio, one row: distinct starts in [0, frames - span), union of their spans."""
    mask = np.zeros(frames, bool)
    number = max(1, rounded(rng, ratio * frames / span))
    for start in rng.choice(frames - span, number, replace=False):
        mask[start : start + span] = True
    return mask


def equalize(rng, rows):
    """Every row keeps as many hidden frames, at random, as the row with the fewest has."""
    fewest = min(int(row.sum()) for row in rows)
    out = []
    for row in rows:
        mask = np.zeros_like(row)
        mask[rng.choice(np.flatnonzero(row), fewest, replace=False)] = True
        out.append(mask)
    return out


def block_line(rng, length, ratio, adjust, block, inverse):
    """data2vec 2.0 audio: blocks mark hidden frames (or kept ones: `inverse`), then single frames
    at random bring the marked number to floor(length * share). Returns mask, marks before that."""
    share = 1 - ratio if inverse else ratio
    marked = np.zeros(length, bool)
    for _ in range(math.floor(length * (share + adjust) / block)):
        centre = rng.integers(length)
        for offset in range(-(block // 2), block - block // 2):
            marked[min(max(centre + offset, 0), length - 1)] = True
    before, target = int(marked.sum()), math.floor(length * share)
    if before > target:
        marked[rng.choice(np.flatnonzero(marked), before - target, replace=False)] = False
    elif before < target:
        marked[rng.choice(np.flatnonzero(~marked), target - before, replace=False)] = True
    return (~marked if inverse else marked), before


def uniform(rng, length, ratio):
    """data2vec 2.0 text: floor(length * (1 - ratio)) tokens with the smallest noise stay."""
    order = sorted(range(length), key=rng.random(length).__getitem__)
    mask = np.ones(length, bool)
    mask[order[: math.floor(length * (1 - ratio))]] = False
    return mask
