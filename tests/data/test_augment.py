import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bivl.data import augment


def picture(height=40, width=60, seed=0):
    """Smooth colours, so that lossy formats stay near."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + seed), np.cos(y / 7), np.sin((x + y) / 11)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def on_arrays(change):
    """`change` of a picture, from array to array."""
    return lambda image, *args, **options: np.array(
        change(Image.fromarray(image), *args, **options)
    )


center_crop, center_view, resize_shorter, show = map(
    on_arrays, (augment.center_crop, augment.center_view, augment.resize_shorter, augment.show)
)


def jittered(image, rng, *strengths, **options):
    changes = augment.draw_jitter(rng, *strengths, **options)
    return on_arrays(augment.change_colors)(image, changes)


def test_crop_windows_follow_torchvision():
    rng = np.random.default_rng(0)
    windows = np.array([augment.crop_window(rng, 300, 400) for _ in range(3000)])
    top, left, h, w = windows.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + h <= 300).all() and (left + w <= 400).all()
    assert h.max() > 290 and top.min() == 0
    share, aspect = h * w / 120000, w / h
    assert share.min() > 0.075 and 0.3 < share.mean() < 0.6
    assert 0.74 < aspect.min() < 0.76 and 1.32 < aspect.max() < 1.35
    # Where every window fits, width and height are treated alike.
    small = [augment.crop_window(rng, 400, 400, scale=(0.1, 0.5)) for _ in range(3000)]
    assert abs(np.mean([np.log(w / h) for _, _, h, w in small])) < 0.015


@pytest.mark.parametrize(
    "size, window",
    [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((30, 30), (0, 0, 30, 30))],
)
def test_crop_fallback_is_central(size, window):
    # A scale over 1 never fits, so the ten attempts fail.
    drawn = augment.crop_window(np.random.default_rng(0), *size, scale=(20, 20))
    assert drawn == window


def test_a_view_is_a_window_then_bicubic():
    image = picture()
    top, left, h, w = augment.crop_window(np.random.default_rng(5), 40, 60)
    part = Image.fromarray(image).crop((left, top, left + w, top + h))
    expected = np.array(part.resize((24, 16), Image.Resampling.BICUBIC))
    view = augment.draw_view(np.random.default_rng(5), (40, 60))
    np.testing.assert_array_equal(show(image, view, (16, 24)), expected)


def test_the_window_of_a_mirrored_view_lies_in_the_mirror_image():
    image, views = picture(), []
    for seed in range(400):
        views.append(augment.draw_view(np.random.default_rng(seed), (40, 60), flip=True))
        rng = np.random.default_rng(seed)
        seen = image[:, ::-1] if rng.random() < 0.5 else image
        top, left, h, w = augment.crop_window(rng, 40, 60)
        part = Image.fromarray(np.ascontiguousarray(seen[top : top + h, left : left + w]))
        expected = np.array(part.resize((9, 9), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(show(image, views[-1], (9, 9)), expected)
    assert 150 < sum(view.mirrored for view in views) < 250
    whole = augment.View((), True, (0, 0, 40, 60))
    np.testing.assert_array_equal(show(image, whole, (40, 60)), image[:, ::-1])
    whole = dataclasses.replace(whole, mirrored=False)
    np.testing.assert_array_equal(show(image, whole, (40, 60)), image)


def test_a_view_changes_colours_before_it_cuts():
    image = picture()
    view = augment.draw_view(np.random.default_rng(4), (40, 60), (0.4, 0.4, 0.4), flip=True)
    rng = np.random.default_rng(4)
    changed = jittered(image, rng, 0.4, 0.4, 0.4)
    rest = augment.draw_view(rng, (40, 60), flip=True)
    np.testing.assert_array_equal(show(image, view, (8, 8)), show(changed, rest, (8, 8)))
    assert not np.array_equal(show(image, rest, (8, 8)), show(changed, rest, (8, 8)))


def test_a_view_shrinks_no_further_than_the_size_wanted():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        height, width, size = *rng.integers(9, 2000, 2), tuple(rng.integers(1, 300, 2))
        view = augment.draw_view(rng, (int(height), int(width)))
        factor = view.shrinkage(size)
        _, _, h, w = view.window
        assert factor in (1, 2, 4, 8)
        assert factor == 8 or h // (2 * factor) < size[0] or w // (2 * factor) < size[1]
        top, left, small_h, small_w = view.shrunk(factor).window
        if factor > 1:
            assert small_h >= size[0] and small_w >= size[1]
        assert abs(top - view.window[0] / factor) <= 0.5 >= abs(left - view.window[1] / factor)
        assert abs(small_h - h / factor) <= 1 >= abs(small_w - w / factor)
        assert top + small_h <= -(-height // factor) and left + small_w <= -(-width // factor)
    same = augment.View((), False, (3, 5, 7, 9))
    assert same.shrinkage((7, 9)) == 1 and same.shrunk(1) == same


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("name", ENHANCERS)
def test_one_colour_property_is_its_enhancer(name):
    image = picture()
    out = jittered(image, np.random.default_rng(1), **{name: 0.4})
    rng = np.random.default_rng(1)
    rng.permutation(4)
    strengths = [0.4 if key == name else 0.0 for key in ENHANCERS]
    factors = [rng.uniform(1 - v, 1 + v) for v in strengths]
    factor = factors[list(ENHANCERS).index(name)]
    assert abs(factor - 1) > 0.01
    expected = np.array(ENHANCERS[name](Image.fromarray(image)).enhance(factor))
    np.testing.assert_array_equal(out, expected)
    assert not np.array_equal(out, image)


def test_brightness_by_hand_and_its_range():
    image = np.full((2, 2, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    values = [jittered(image, rng, brightness=0.4)[0, 0, 0] for _ in range(500)]
    assert 60 <= min(values) < 65 and 135 < max(values) <= 140
    strong = [jittered(image, rng, brightness=3.0)[0, 0, 0] for _ in range(200)]
    assert max(strong) == 255  # factors from 0, not from -2, to 4
    assert np.mean(np.array(strong) == 0) < 0.05


def test_jitter_order_is_random_and_zero_is_identity():
    image = picture()
    same = jittered(image, np.random.default_rng(0))
    np.testing.assert_array_equal(same, image)
    orders = set()
    for seed in range(60):
        out = jittered(image, np.random.default_rng(seed), 0.4, 0.4, 0.4)
        rng = np.random.default_rng(seed)
        order = rng.permutation(4).tolist()
        factors = [rng.uniform(0.6, 1.4) for _ in range(3)]
        expected = Image.fromarray(image)
        for k in order:
            if k < 3:
                expected = list(ENHANCERS.values())[k](expected).enhance(factors[k])
        np.testing.assert_array_equal(out, np.array(expected))
        orders.add(tuple(k for k in order if k < 3))
    assert len(orders) == 6


def test_hue_turns_the_colour_circle():
    red = np.zeros((2, 2, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
    outs = [jittered(red, np.random.default_rng(s), hue=0.5)[0, 0] for s in range(50)]
    assert len({tuple(o) for o in outs}) > 30
    assert all(o.max() == 255 and o.min() <= 2 for o in outs)
    with pytest.raises(ValueError, match="hue"):
        jittered(red, np.random.default_rng(0), hue=0.6)


@pytest.mark.parametrize(
    "shape, size, out",
    [((40, 60), 20, (20, 30)), ((61, 40), 20, (30, 20)), ((30, 30), 30, (30, 30))],
)
def test_resize_shorter_rounds_down(shape, size, out):
    image = picture(*shape)
    resized = resize_shorter(image, size)
    assert resized.shape[:2] == out
    expected = Image.fromarray(image).resize((out[1], out[0]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized, np.array(expected))


def test_center_crop_rounds_and_pads_as_torchvision():
    image = picture(21, 34)
    # (21 - 10) / 2 = 5.5 rounds to the even 6, (34 - 9) / 2 = 12.5 to 12.
    np.testing.assert_array_equal(center_crop(image, (10, 9)), image[6:16, 12:21])
    padded = center_crop(image, (24, 10))
    np.testing.assert_array_equal(padded[1:22], image[:, 12:22])
    assert not padded[0].any() and not padded[22:].any()


def test_center_view():
    image = picture(300, 400)
    expected = center_crop(resize_shorter(image, 256), (224, 224))
    np.testing.assert_array_equal(center_view(image, 224), expected)
    small = picture(64, 64)
    np.testing.assert_array_equal(center_view(small, 64), small)
    whole = center_view(image, 64, crop_ratio=1.0)
    expected = center_crop(resize_shorter(image, 64), (64, 64))
    np.testing.assert_array_equal(whole, expected)
    assert center_view(picture(8, 8), 32).shape == (32, 32, 3)
