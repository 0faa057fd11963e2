import math

import numpy as np
import pytest
from ml_collections import ConfigDict

from bivl.data.masking import block_count, block_mask, sampler


@pytest.fixture(scope="module")
def draws():
    rng = np.random.default_rng(0)
    return np.stack([block_mask(rng, (14, 14), 120, 16, 196) for _ in range(4000)])


def test_statistics_are_those_of_the_reference(draws):
    counts = draws.sum((1, 2))
    assert counts.max() == 120
    # Standard errors: 0.7 % of the share and 0.03 of the mean.
    assert 0.28 < (counts < 120).mean() < 0.34
    assert 119.3 < counts.mean() < 119.7


def test_the_centre_is_masked_more_often_than_the_rim(draws):
    often = draws.mean(0)
    corners = often[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    assert often[6:8, 6:8].mean() > 0.7 > 0.4 > corners
    # No direction is preferred.
    np.testing.assert_allclose(often, often[::-1], atol=0.05)
    np.testing.assert_allclose(often, often.T, atol=0.05)


def _slow_block_mask(rng, height, width, num_masks, min_block, max_block, min_aspect):
    """The rule of the reference on an array; the same draws in the same order as block_mask."""
    mask = np.zeros((height, width), bool)
    while mask.sum() < num_masks:
        cap = min(num_masks - mask.sum(), max_block)
        for a, r, t, l in rng.random((10, 4)):  # noqa: E741
            area = min_block + (cap - min_block) * a
            aspect = math.exp(math.log(min_aspect) * (1 - 2 * r))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = int(t * (height - h + 1)), int(l * (width - w + 1))
            window = mask[top : top + h, left : left + w]
            if 0 < (~window).sum() <= cap:
                window[:] = True
                break
        else:
            break
    return mask


@pytest.mark.parametrize(
    "grid, count, block", [((14, 14), 75, 16), ((8, 8), 40, 4), ((5, 9), 20, 3)]
)
def test_equals_the_rule_written_on_an_array(grid, count, block):
    for seed in range(50):
        fast = block_mask(np.random.default_rng(seed), grid, count, block)
        slow = _slow_block_mask(np.random.default_rng(seed), *grid, count, block, count, 0.3)
        np.testing.assert_array_equal(fast, slow)


@pytest.fixture(scope="module")
def pairs():
    """Masks of 75 of 14 x 14 and what `exact` makes of the same draws."""
    draw = lambda seed, exact: block_mask(np.random.default_rng(seed), 14, 75, exact=exact)  # noqa: E731
    return np.stack([[draw(seed, exact) for exact in (False, True)] for seed in range(3000)])


def test_exact_masks_make_up_what_is_missing(pairs):
    """The figures of BEiT's generator: 67 % exact, mean 74.5; of v2's: always 75."""
    loose, exact = pairs.swapaxes(0, 1)
    counts = loose.sum((1, 2))
    assert 0.63 < (counts == 75).mean() < 0.71 and 74.3 < counts.mean() < 74.7
    assert (exact.sum((1, 2)) == 75).all()
    assert not (loose & ~exact).any()
    np.testing.assert_array_equal(loose[counts == 75], exact[counts == 75])
    added = (exact & ~loose).mean(0)
    assert (added.reshape(2, 7, 2, 7).sum((1, 3)) > 0).all()


def test_exact_masks_keep_the_marginals_of_blocks(pairs):
    often = pairs[:, 1].mean(0)
    np.testing.assert_allclose(often[[0, 0, -1, -1], [0, -1, 0, -1]], 0.05, atol=0.02)
    np.testing.assert_allclose(often[[0, 7, 7, -1], [7, 0, -1, 7]], 0.2, atol=0.04)
    np.testing.assert_allclose(often[6:8, 6:8], 0.71, atol=0.04)


def test_the_sampler_of_exact_blocks():
    config = ConfigDict({"mask_ratio": 75 / 196})
    config.masking = {"kind": "block", "min_block": 16, "exact": True}
    draw = sampler(config, (14, 14))
    masks = [draw(np.random.default_rng(seed))["mask"] for seed in range(200)]
    assert {mask.sum() for mask in masks} == {block_count(75 / 196, (14, 14))} == {75}
    config.masking = {"kind": "block", "min_block": 16}
    draw = sampler(config, (14, 14))
    assert len({draw(np.random.default_rng(seed))["mask"].sum() for seed in range(200)}) > 1


def test_blocks_reach_every_cell_and_never_span_the_grid():
    rng = np.random.default_rng(0)
    masks = np.stack([block_mask(rng, (6, 6), 9, 4, 9) for _ in range(500)])
    assert masks.any(0).all()
    single = np.stack([block_mask(rng, (3, 3), 4, 4, 4) for _ in range(200)])
    assert not single.all(1).any() and not single.all(2).any()


def test_same_generator_same_mask_and_shapes():
    a, b = (block_mask(np.random.default_rng(3), (4, 7), 10, 2) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (4, 7) and a.dtype == bool
    assert block_mask(np.random.default_rng(3), 5, 10, 2).shape == (5, 5)
    assert not block_mask(np.random.default_rng(3), 5, 0).any()


def test_refuses_more_cells_than_there_are():
    with pytest.raises(ValueError, match="num_masks=26"):
        block_mask(np.random.default_rng(0), 5, 26)
