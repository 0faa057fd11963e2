import numpy as np
import pytest
from PIL import Image

from bivl.core.errors import UserError
from bivl.data import randaugment
from bivl.data.randaugment import OPERATIONS, erasing_box, strength

OPTIONS = {"resample": Image.Resampling.BILINEAR, "fillcolor": (1, 2, 3)}


class Coin:
    """A generator whose every draw is `value`."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


def noise(height=24, width=40, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def rand_augment(image, rng, *args, **options):
    return np.array(randaugment.rand_augment(Image.fromarray(image), rng, *args, **options))


def apply(name, image, value):
    return np.array(OPERATIONS[name](Image.fromarray(image), value, OPTIONS))


# timm's scales at magnitudes 0, 5, 9 and 10, written out by hand.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rotate", (0, 15, 27, 30)),
        ("shear_x", (0, 0.15, 0.27, 0.3)),
        ("shear_y", (0, 0.15, 0.27, 0.3)),
        ("translate_x", (0, 0.225, 0.405, 0.45)),
        ("translate_y", (0, 0.225, 0.405, 0.45)),
        ("posterize", (4, 2, 1, 0)),
        ("solarize", (256, 128, 26, 0)),
        ("solarize_add", (0, 55, 99, 110)),
        ("color", (1, 1.45, 1.81, 1.9)),
        ("contrast", (1, 1.45, 1.81, 1.9)),
        ("brightness", (1, 1.45, 1.81, 1.9)),
        ("sharpness", (1, 1.45, 1.81, 1.9)),
    ],
)
def test_strengths_are_timms(name, expected):
    found = [strength(name, m / 10, Coin(0.2)) for m in (0, 5, 9, 10)]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    turned = [strength(name, m / 10, Coin(0.8)) for m in (0, 5, 9, 10)]
    if name in ("color", "contrast", "brightness", "sharpness"):
        np.testing.assert_allclose(turned, [2 - value for value in expected], atol=1e-12)
    elif name in ("posterize", "solarize", "solarize_add"):
        assert turned == found
    else:
        np.testing.assert_allclose(turned, np.negative(expected), atol=1e-12)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("posterize", (0, 2, 3)), ("solarize", (0, 128, 230)), ("color", (0.1, 1.0, 1.72))],
)
def test_the_scale_that_does_not_increase(name, expected):
    found = [strength(name, m / 10, Coin(0.8), increasing=False) for m in (0, 5, 9)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_there_are_fifteen_operations():
    assert len(OPERATIONS) == 15
    assert [n for n in OPERATIONS if strength(n, 0.5, Coin(0.2)) is None] == [
        "auto_contrast",
        "equalize",
        "invert",
    ]


def test_point_operations_in_numpy():
    image = noise()
    wide = image.astype(int)
    cases = {
        ("invert", None): 255 - wide,
        ("posterize", 2): wide & 0b11000000,
        ("posterize", 0): wide * 0,
        ("solarize", 100): np.where(wide < 100, wide, 255 - wide),
        ("solarize_add", 99): np.where(wide < 128, wide + 99, wide),
        ("brightness", 0.5): wide // 2,
    }
    for (name, value), expected in cases.items():
        assert np.abs(apply(name, image, value) - expected).max() <= (name == "brightness"), name
    low = np.array(noise() // 4 + 50)
    stretched = apply("auto_contrast", low, None)
    assert (stretched.min(axis=(0, 1)) == 0).all() and stretched.max(axis=(0, 1)).min() >= 254


def test_moves_bring_in_the_fill_colour():
    image = noise(24, 40)
    moved = apply("translate_x", image, 0.25)  # 10 of 40 pixels to the left
    np.testing.assert_array_equal(moved[:, :30], image[:, 10:])
    assert (moved[:, 30:] == [1, 2, 3]).all()
    moved = apply("translate_y", image, -0.25)  # 6 of 24 pixels down
    np.testing.assert_array_equal(moved[6:], image[:18])
    assert (moved[:6] == [1, 2, 3]).all()
    turned = apply("rotate", noise(25, 25), 90)
    np.testing.assert_array_equal(turned, np.rot90(noise(25, 25)))
    sheared = apply("shear_x", np.repeat(noise(1, 40), 24, axis=0), 1.0)
    np.testing.assert_array_equal(sheared[4, :30], sheared[1, 3:33])


def test_skipped_and_drawn_as_often_as_the_policy_says():
    image, rng = noise(4, 4), np.random.default_rng(0)
    same = [np.array_equal(rand_augment(image, rng, layers=1), image) for _ in range(2000)]
    # Half are skipped; of the other half few operations leave this image alone.
    assert 0.47 < np.mean(same) < 0.58
    assert all(np.array_equal(rand_augment(image, rng, probability=0.0), image) for _ in range(9))


def test_magnitudes_are_normal_and_clipped(monkeypatch):
    seen = []

    def spy(name, level, rng, increasing):
        seen.append(level)
        return

    monkeypatch.setattr(randaugment, "strength", spy)
    monkeypatch.setattr(randaugment, "OPERATIONS", {"none": lambda p, value, options: p})
    rng = np.random.default_rng(0)
    for _ in range(1000):
        rand_augment(noise(2, 2), rng, probability=1.0)
    assert len(seen) == 2000 and max(seen) == 1.0
    assert np.mean(seen) == pytest.approx(0.9, abs=0.005)
    assert np.std(seen) == pytest.approx(0.05, abs=0.005)
    assert np.mean(np.array(seen) == 1.0) == pytest.approx(0.0228, abs=0.012)  # P(z > 2)


def test_same_randomness_gives_the_same_image():
    first, second = (rand_augment(noise(), np.random.default_rng(7), 10, 3.0, 4) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (24, 40, 3) and first.dtype == np.uint8


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_every_operation_runs_at_every_strength(interpolation):
    rng = np.random.default_rng(0)
    for magnitude in (0, 10):
        for _ in range(60):
            options = {"std": 0.0, "probability": 1.0, "interpolation": interpolation}
            assert rand_augment(noise(), rng, magnitude, **options).shape == (24, 40, 3)


def test_pairs_are_changed_as_beit3_is_tuned(monkeypatch):
    """Ten operations at level 7 of 10: what each is called with, in a picture of 40 x 24."""
    seen = {}

    def spy(name):
        return lambda picture, value, options: seen.setdefault(name, set()).add(value) or picture

    monkeypatch.setattr(randaugment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    rng, picture = np.random.default_rng(0), Image.fromarray(noise())
    for _ in range(300):
        assert randaugment.rand_augment_pairs(picture, rng) is picture
    once = {"brightness": 1.36, "sharpness": 1.36}
    both = {"shear_x": 0.21, "shear_y": 0.21, "translate_x": 7 / 40, "translate_y": 7 / 24}
    both["rotate"] = 21
    assert seen.keys() == {"auto_contrast", "equalize", *once, *both}
    for name, value in once.items():
        assert list(seen[name]) == [pytest.approx(value)]
    for name, value in both.items():
        np.testing.assert_allclose(sorted(seen[name]), (-value, value), rtol=1e-6)


def test_pairs_are_left_alone_as_often_as_the_policy_says():
    picture, rng = Image.fromarray(noise()), np.random.default_rng(0)
    drawn = [np.array(randaugment.rand_augment_pairs(picture, rng, 7.0, 1)) for _ in range(2000)]
    same = np.mean([np.array_equal(x, noise()) for x in drawn])
    # Half are skipped, identity is a tenth of the rest, and noise already has the whole range.
    assert 0.55 < same < 0.68
    assert max((x == 128).all(-1).mean() for x in drawn) > 0.1  # grey comes in


def test_unknown_interpolation_is_refused():
    with pytest.raises(UserError, match="interpolation='lanczos' is unknown; use bilinear"):
        rand_augment(noise(), np.random.default_rng(0), interpolation="lanczos")


def test_erasing_boxes_follow_the_published_draw():
    rng, size = np.random.default_rng(0), (60, 80)
    boxes = np.array([erasing_box(rng, size) for _ in range(4000)])
    assert boxes.dtype == np.int32
    erased = boxes[boxes[:, 2] > 0]
    assert len(erased) / 4000 == pytest.approx(0.25, abs=0.03)
    top, left, h, w = erased.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 60).all() and (left + w <= 80).all()
    area = h * w / (60 * 80)
    assert area.min() > 0.015 and area.max() < 0.345
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    aspect = np.log(h / w)
    assert abs(aspect).max() < np.log(1 / 0.3) + 0.1 and aspect.std() > 0.5
    assert not erasing_box(rng, size, probability=0.0).any()
    assert not erasing_box(rng, (2, 2), 1.0, area=(1.0, 1.0), aspect=(1.0, 1.0)).any()  # never fits
