"""Masks of sequences: the statistics of the reference, and its rule written out in plain Python."""

import math

import numpy as np
import pytest

from bivl.data.sequence_masking import bert_mask, frame_spans, text_spans


class Recorder:
    """A generator that keeps all it gave: lists for choices and arrays, floats for numbers."""

    def __init__(self, seed):
        self.rng, self.given = np.random.default_rng(seed), []

    def random(self, size=None):
        self.given.append(np.asarray(self.rng.random(size)).tolist())
        return np.asarray(self.given[-1])[()]

    def choice(self, top, size, replace):
        assert not replace
        self.given.append((top, self.rng.choice(top, size, replace=False).tolist()))
        return np.array(self.given[-1][1], np.int64)

    def integers(self, top):
        self.given.append(int(self.rng.integers(top)))
        return self.given[-1]


def covered(size, starts, span):
    mask = [False] * size
    for start in starts:
        for place in range(start, start + span):
            if place < size:
                mask[place] = True
    return mask


def statistics(draw, count=3000):
    rng = np.random.default_rng(0)
    return np.stack([draw(rng) for _ in range(count)])


def test_text_spans_cover_the_share_of_the_reference():
    masks = statistics(lambda rng: text_spans(rng, 512, 0.35, 4))
    # 44.8 distinct starts of 512: a token is visible with chance (1 - 44.8/512)^4, about .69.
    assert abs(masks.mean() - (1 - (1 - 0.35 / 4) ** 4)) < 0.003
    assert 0.30 < masks.mean() < 0.315
    counts = masks.sum(1)
    assert counts.std() > 2 and counts.max() <= 45 * 4
    often = masks.mean(0)
    # All positions start a span; so only the first three are masked less often.
    assert abs(often[0] - 0.0875) < 0.02 and often[0] < often[1] < often[2] < often[3]
    np.testing.assert_allclose(often[3:], often[3:].mean(), atol=0.045)


@pytest.mark.parametrize("size, ratio, span", [(512, 0.35, 4), (7, 0.35, 4), (40, 1.0, 1)])
def test_text_spans_equal_the_rule_in_plain_python(size, ratio, span):
    for seed in range(50):
        rng = Recorder(seed)
        mask = text_spans(rng, size, ratio, span)
        extra, (top, starts) = rng.given
        assert top == size and len(set(starts)) == len(starts)
        assert len(starts) == math.floor(ratio * size / span + extra)
        assert mask.tolist() == covered(size, starts, span) and mask.dtype == bool


def test_text_spans_of_nothing_and_of_little():
    rng = np.random.default_rng(0)
    assert text_spans(rng, 0, 0.35, 4).shape == (0,)
    draws = [text_spans(rng, 3, 0.35, 4).any() for _ in range(400)]
    assert 0.15 < np.mean(draws) < 0.4  # one span in 0.26 of the draws


def test_bert_mask_equals_the_rule_in_plain_python():
    for seed in range(50):
        rng = Recorder(seed)
        chosen, kept, randomized = bert_mask(rng, 101, 0.15, 0.1, 0.2)
        extra, (top, places), change, decision = rng.given
        assert top == 101 and len(places) == math.floor(15.15 + extra)
        for place in range(101):
            is_chosen = place in places
            is_changed = is_chosen and change[place] < 0.1 + 0.2
            is_kept = is_changed and decision[place] < 0.1 / (0.1 + 0.2)
            assert chosen[place] == is_chosen and kept[place] == is_kept
            assert randomized[place] == (is_changed and not is_kept)


def test_bert_mask_shares():
    masks = statistics(lambda rng: np.stack(bert_mask(rng, 512, 0.15, 0.1, 0.1)))
    chosen, kept, randomized = masks.transpose(1, 0, 2)
    assert set(chosen.sum(1)) == {76, 77} and abs(chosen.sum(1).mean() - 76.8) < 0.05
    assert not (kept & randomized).any() and not ((kept | randomized) & ~chosen).any()
    for part in (kept, randomized):
        assert abs(part.sum() / chosen.sum() - 0.1) < 0.004
    np.testing.assert_allclose(chosen.mean(0), 0.15, atol=0.03)


@pytest.mark.parametrize("kept, randomized", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.4, 0.6)])
def test_bert_mask_without_one_kind(kept, randomized):
    masks = statistics(lambda rng: np.stack(bert_mask(rng, 200, 0.3, kept, randomized)), 500)
    chosen = masks[:, 0].sum()
    assert abs(masks[:, 1].sum() / chosen - kept) < 0.02
    assert abs(masks[:, 2].sum() / chosen - randomized) < 0.02
    if kept + randomized == 1:
        np.testing.assert_array_equal(masks[:, 0], masks[:, 1] | masks[:, 2])


def test_frame_spans_cover_the_share_of_the_reference():
    masks = statistics(lambda rng: frame_spans(rng, 500, 0.65, 10))
    # 32.5 distinct starts of 490; about 48 % of the frames, the last ones too.
    assert 0.475 < masks.mean() < 0.495
    assert masks[:, 499].sum() == 0 and masks[:, 498].sum() > 0  # starts end before frames - span
    assert masks.sum(1).max() <= 330
    inner = masks.mean(0)[10:490]
    np.testing.assert_allclose(inner, inner.mean(), atol=0.05)


@pytest.mark.parametrize("frames, ratio, span", [(500, 0.65, 10), (14, 0.65, 10), (30, 0.01, 10)])
def test_frame_spans_equal_the_rule_in_plain_python(frames, ratio, span):
    for seed in range(50):
        rng = Recorder(seed)
        mask = frame_spans(rng, frames, ratio, span)
        extra, (top, starts) = rng.given
        count = max(1, math.floor(ratio * frames / span + extra))
        assert len(starts) == len(set(starts)) == count
        assert top == frames - span > count and all(0 <= s < frames - span for s in starts)
        assert mask.tolist() == covered(frames, starts, span)


@pytest.mark.parametrize("frames", range(1, 13))
@pytest.mark.parametrize("ratio, span", [(0.65, 10), (1.0, 1), (1.0, 3)])
def test_frame_spans_of_short_sounds(frames, ratio, span):
    """Never all frames, and where the reference would not refuse, what it gives."""
    for seed in range(30):
        rng = Recorder(seed)
        mask = frame_spans(rng, frames, ratio, span)
        extra, (top, starts), *visible = rng.given
        count = max(1, math.floor(ratio * frames / span + extra))
        assert len(starts) == min(count, frames)
        assert top == (frames - span if frames - span > len(starts) else len(starts) + 1)
        expected = covered(frames, starts, span)
        if all(expected):
            expected[visible[0]] = False
        assert mask.tolist() == expected and not mask.all()


def test_frame_spans_of_nothing():
    assert frame_spans(np.random.default_rng(0), 0, 0.65, 10).shape == (0,)
