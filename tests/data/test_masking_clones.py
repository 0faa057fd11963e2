"""The samplers of data2vec 2.0: equal counts in every draw."""

import numpy as np
import pytest

from bivl.data.masking import SAMPLERS, inverse_block_mask, random_mask

GRID = (14, 14)


class Recorder:
    """A generator that remembers how many centres were drawn, and may dictate them."""

    def __init__(self, seed, centres=None):
        self.rng, self.centres, self.counts = np.random.default_rng(seed), centres, []

    def integers(self, low, high, size):
        self.counts.append(size)
        return self.rng.integers(low, high, size) if self.centres is None else self.centres

    def __getattr__(self, name):
        return getattr(self.rng, name)


@pytest.mark.parametrize(
    "grid, ratio, block, adjust, inverse, kept, centres",
    [
        (GRID, 0.8, 3, 0.07, True, 39, 5),  # ViT-B
        (GRID, 0.75, 3, 0.1, True, 49, 7),  # ViT-L, ViT-H/16
        ((16, 16), 0.75, 3, 0.1, True, 64, 9),  # ViT-H/14
        ((100,), 0.5, 5, 0.05, False, 50, 11),  # speech
    ],
)
def test_published_counts(grid, ratio, block, adjust, inverse, kept, centres):
    recorder = Recorder(0)
    for _ in range(200):
        mask = inverse_block_mask(recorder, grid, ratio, block, adjust, inverse)
        assert mask.shape == (np.prod(grid),) and mask.dtype == bool
        assert (~mask).sum() == kept
    assert set(recorder.counts) == {centres}


@pytest.mark.parametrize(
    "centres, rows, columns",
    [
        ([3 * 14 + 4], [2, 3, 4], [3, 4, 5]),
        ([0], [0, 1], [0, 1]),  # -1 is clamped to 0
        ([13], [0, 1], [12, 13]),
        ([195], [12, 13], [12, 13]),
        ([14 * 5], [4, 5, 6], [0, 1]),
    ],
)
def test_a_block_stands_round_its_centre_and_is_clamped(centres, rows, columns):
    """A ratio that keeps exactly the block's own cells leaves nothing to chance."""
    block = np.zeros(GRID, bool)
    block[np.ix_(rows, columns)] = True
    ratio = 1 - (block.sum() + 0.5) / 196
    rng = Recorder(0, np.array(centres))
    np.testing.assert_array_equal(~inverse_block_mask(rng, GRID, ratio, 3, 0.1), block.reshape(-1))
    rng = Recorder(0, np.array(centres))
    masked = inverse_block_mask(rng, GRID, 1 - ratio, 3, 0.1, inverse=False)
    np.testing.assert_array_equal(masked, block.reshape(-1))


@pytest.mark.parametrize(
    "centre, cells", [(50, range(48, 53)), (0, range(3)), (1, range(4)), (99, range(97, 100))]
)
def test_a_line_has_blocks_too(centre, cells):
    mask = inverse_block_mask(Recorder(0, np.array([centre])), (100,), 0.5, 5, 0.05, inverse=False)
    assert mask[list(cells)].all() and mask.sum() == 50


def test_even_blocks_reach_further_back():
    """Offsets -b // 2 .. b - 1 - b // 2."""
    rng = Recorder(0, np.array([10]))
    mask = inverse_block_mask(rng, (100,), 0.041, 4, 0.05, inverse=False)
    np.testing.assert_array_equal(np.flatnonzero(mask), [8, 9, 10, 11])


def test_surplus_and_shortfall_are_made_up_at_random():
    """Too many marked: cells of the blocks go. Too few: all of the blocks stay."""
    block = np.zeros(GRID, bool)
    block[2:5, 3:6] = True
    for kept in (4, 30):
        ratio = 1 - (kept + 0.5) / 196
        draws = [
            ~inverse_block_mask(Recorder(i, np.array([46])), GRID, ratio, 3, 0.1) for i in range(40)
        ]
        assert all(draw.sum() == kept for draw in draws)
        inside = np.stack(draws)[:, block.reshape(-1)]
        assert (inside.sum(1) == min(kept, 9)).all()
        assert len({draw.tobytes() for draw in draws}) > 30
        assert inside.any(0).all()


def test_blocks_prefer_no_direction():
    """Marginals have the symmetries of the square; at the rim fewer blocks end, clamped or not."""
    rng = np.random.default_rng(0)
    kept = ~np.stack([inverse_block_mask(rng, GRID, 0.8, 3, 0.07) for _ in range(6000)])
    often = kept.reshape(-1, *GRID).mean(0)
    np.testing.assert_allclose(often.mean(), 39 / 196, rtol=1e-9)
    # Standard error of a cell's frequency: 0.0052; of a difference of two: 0.0073.
    for other in (often[::-1], often[:, ::-1], often.T):
        np.testing.assert_allclose(often, other, atol=0.035)
        assert np.abs(often - other).mean() < 0.009
    corners = often[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert corners < 0.17 < 0.2 < often[3:-3, 3:-3].mean()
    # Neighbours are kept together far more often than cells that are far apart.
    near, far = kept[:, 90] & kept[:, 91], kept[:, 90] & kept[:, 20]
    assert near.mean() > 1.5 * far.mean()


@pytest.mark.parametrize("total, ratio, kept", [(512, 0.48, 266), (512, 0.5, 256), (10, 0.75, 2)])
def test_random_masks_have_one_count_and_no_preference(total, ratio, kept):
    rng = np.random.default_rng(0)
    masks = np.stack([random_mask(rng, total, ratio) for _ in range(1000)])
    assert masks.shape == (1000, total) and masks.dtype == bool
    assert ((~masks).sum(1) == kept).all()
    # Five standard errors of 0.016.
    np.testing.assert_allclose((~masks).mean(0), kept / total, atol=0.08)


@pytest.mark.parametrize(
    "kind, settings, kept",
    [("inverse_block", {"block": 3, "adjust": 0.07}, 39), ("random", {}, 39)],
)
def test_keep_is_sorted_and_complementary(kind, settings, kept):
    sample = SAMPLERS[kind](0.8, GRID, num_masks=16, **settings)
    drawn = sample(np.random.default_rng(0))
    mask, keep = drawn["mask"], drawn["keep"]
    assert mask.shape == (16, 196) and mask.dtype == bool
    assert keep.shape == (16, kept) and keep.dtype == np.int32
    assert (np.diff(keep, axis=1) > 0).all()
    for m, k in zip(mask, keep, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(~m), k)
    assert len({m.tobytes() for m in mask}) == 16  # clones differ
    again = sample(np.random.default_rng(0))
    np.testing.assert_array_equal(mask, again["mask"])
