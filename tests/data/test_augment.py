import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from bivl.core.errors import Undecodable
from bivl.data import augment


def picture(height=40, width=60, seed=0):
    """Smooth colours, so that lossy formats stay near."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9 + seed), np.cos(y / 7), np.sin((x + y) / 11)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def encode(image, form, **options):
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "form, options, error",
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 90}, 25),
        ("JPEG", {"quality": 95}, 25),
    ],
)
def test_decodes_every_format(form, options, error):
    image = picture()
    decoded = augment.decode_image(encode(image, form, **options))
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).max() <= error


def test_accepts_arrays_paths_and_pil_images(tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    path.write_bytes(encode(image, "PNG"))
    for value in (image, path, str(path), Image.fromarray(image), memoryview(path.read_bytes())):
        np.testing.assert_array_equal(augment.decode_image(value), image)


def test_grey_palette_and_two_tone():
    grey = picture()[..., 0]
    for value in (grey, grey[..., None], encode(grey, "PNG")):
        np.testing.assert_array_equal(augment.decode_image(value), np.stack([grey] * 3, -1))
    palette = Image.fromarray(picture()).quantize(64)
    expected = np.array(palette.convert("RGB"))
    np.testing.assert_array_equal(augment.decode_image(encode(palette, "PNG")), expected)
    tones = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(
        augment.decode_image(encode(tones, "PNG"))[..., 0], np.array(tones) * np.uint8(255)
    )


def test_alpha_is_composited_on_white():
    rgba = np.dstack([picture(), np.full((40, 60), 255, np.uint8)])
    rgba[:20, :, 3] = 0
    rgba[20:30, :, 3] = 51  # one fifth
    for value in (rgba, encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True)):
        decoded = augment.decode_image(value)
        assert (decoded[:20] == 255).all()
        blend = rgba[20:30, :, :3] * 0.2 + 255 * 0.8
        assert np.abs(decoded[20:30] - blend).max() <= 1
        np.testing.assert_array_equal(decoded[30:], rgba[30:, :, :3])
    grey_alpha = np.dstack([np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)])
    assert (augment.decode_image(encode(grey_alpha, "PNG")) == 255).all()


def test_a_transparent_palette_entry_becomes_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 1)
    decoded = augment.decode_image(encode(palette, "PNG", transparency=0))
    assert decoded[0, 0].tolist() == [200, 100, 50]
    assert decoded[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(form):
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65279, 65535]], np.uint16)
    expected = np.round(values / 257)
    np.testing.assert_array_equal(augment.decode_image(encode(values, form))[..., 0], expected)
    np.testing.assert_array_equal(augment.decode_image(values)[..., 1], expected)


def test_cmyk_jpeg():
    cmyk = Image.fromarray(picture()).convert("CMYK")
    decoded = augment.decode_image(encode(cmyk, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - np.array(cmyk.convert("RGB"))).max() <= 25


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (augment.decode_image(data) == [255, 0, 0]).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(form, orientation):
    image = picture()
    upright = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image, -1),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = augment.decode_image(encode(image, form, exif=exif))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_raise(form):
    data = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), form)
    with pytest.raises(Undecodable):
        augment.decode_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"no image",
        "missing.png",
        None,
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        Image.new("F", (4, 4)),
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_what_is_no_image_raises(value):
    with pytest.raises(Undecodable):
        augment.decode_image(value)


def test_a_decompression_bomb_raises_before_it_is_decoded():
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**13, 2**13 + 1, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(Undecodable, match="over the limit"):
        augment.decode_image(data)


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


def test_random_resized_crop_is_crop_then_bicubic():
    image = picture()
    top, left, h, w = augment.crop_window(np.random.default_rng(5), 40, 60)
    part = Image.fromarray(image).crop((left, top, left + w, top + h))
    expected = np.array(part.resize((24, 16), Image.Resampling.BICUBIC))
    out = augment.random_resized_crop(image, np.random.default_rng(5), (16, 24))
    np.testing.assert_array_equal(out, expected)
    assert augment.random_resized_crop(image, np.random.default_rng(5), 20).shape == (20, 20, 3)


def test_horizontal_flip():
    image, rng = picture(), np.random.default_rng(0)
    np.testing.assert_array_equal(augment.horizontal_flip(image, rng, 1.0), image[:, ::-1])
    np.testing.assert_array_equal(augment.horizontal_flip(image, rng, 0.0), image)
    flips = [not np.array_equal(augment.horizontal_flip(image, rng), image) for _ in range(400)]
    assert 150 < sum(flips) < 250


ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("name", ENHANCERS)
def test_one_colour_property_is_its_enhancer(name):
    image = picture()
    out = augment.color_jitter(image, np.random.default_rng(1), **{name: 0.4})
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
    values = [augment.color_jitter(image, rng, brightness=0.4)[0, 0, 0] for _ in range(500)]
    assert 60 <= min(values) < 65 and 135 < max(values) <= 140
    strong = [augment.color_jitter(image, rng, brightness=3.0)[0, 0, 0] for _ in range(200)]
    assert max(strong) == 255  # factors from 0, not from -2, to 4
    assert np.mean(np.array(strong) == 0) < 0.05


def test_jitter_order_is_random_and_zero_is_identity():
    image = picture()
    same = augment.color_jitter(image, np.random.default_rng(0))
    np.testing.assert_array_equal(same, image)
    orders = set()
    for seed in range(60):
        out = augment.color_jitter(image, np.random.default_rng(seed), 0.4, 0.4, 0.4)
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
    outs = [augment.color_jitter(red, np.random.default_rng(s), hue=0.5)[0, 0] for s in range(50)]
    assert len({tuple(o) for o in outs}) > 30
    assert all(o.max() == 255 and o.min() <= 2 for o in outs)
    with pytest.raises(ValueError, match="hue"):
        augment.color_jitter(red, np.random.default_rng(0), hue=0.6)


@pytest.mark.parametrize(
    "shape, size, out",
    [((40, 60), 20, (20, 30)), ((61, 40), 20, (30, 20)), ((30, 30), 30, (30, 30))],
)
def test_resize_shorter_rounds_down(shape, size, out):
    image = picture(*shape)
    resized = augment.resize_shorter(image, size)
    assert resized.shape[:2] == out
    expected = Image.fromarray(image).resize((out[1], out[0]), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resized, np.array(expected))


def test_center_crop_rounds_and_pads_as_torchvision():
    image = picture(21, 34)
    # (21 - 10) / 2 = 5.5 rounds to the even 6, (34 - 9) / 2 = 12.5 to 12.
    np.testing.assert_array_equal(augment.center_crop(image, (10, 9)), image[6:16, 12:21])
    padded = augment.center_crop(image, (24, 10))
    np.testing.assert_array_equal(padded[1:22], image[:, 12:22])
    assert not padded[0].any() and not padded[22:].any()


def test_center_view():
    image = picture(300, 400)
    expected = augment.center_crop(augment.resize_shorter(image, 256), 224)
    np.testing.assert_array_equal(augment.center_view(image, 224), expected)
    small = picture(64, 64)
    np.testing.assert_array_equal(augment.center_view(small, 64), small)
    whole = augment.center_view(image, 64, crop_ratio=1.0)
    expected = augment.center_crop(augment.resize_shorter(image, 64), 64)
    np.testing.assert_array_equal(whole, expected)
    assert augment.center_view(picture(8, 8), 32).shape == (32, 32, 3)
