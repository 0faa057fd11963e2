import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from bivl.core.errors import Undecodable
from bivl.data import images


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
    decoded = images.decode_image(encode(image, form, **options))
    assert decoded.shape == image.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - image).max() <= error


def test_accepts_arrays_paths_and_pil_images(tmp_path):
    image = picture()
    path = tmp_path / "a.png"
    path.write_bytes(encode(image, "PNG"))
    for value in (image, path, str(path), Image.fromarray(image), memoryview(path.read_bytes())):
        np.testing.assert_array_equal(images.decode_image(value), image)


def test_grey_palette_and_two_tone():
    grey = picture()[..., 0]
    for value in (grey, grey[..., None], encode(grey, "PNG")):
        np.testing.assert_array_equal(images.decode_image(value), np.stack([grey] * 3, -1))
    palette = Image.fromarray(picture()).quantize(64)
    expected = np.array(palette.convert("RGB"))
    np.testing.assert_array_equal(images.decode_image(encode(palette, "PNG")), expected)
    tones = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(
        images.decode_image(encode(tones, "PNG"))[..., 0], np.array(tones) * np.uint8(255)
    )


def test_alpha_is_composited_on_white():
    rgba = np.dstack([picture(), np.full((40, 60), 255, np.uint8)])
    rgba[:20, :, 3] = 0
    rgba[20:30, :, 3] = 51  # one fifth
    for value in (rgba, encode(rgba, "PNG"), encode(rgba, "WEBP", lossless=True, exact=True)):
        decoded = images.decode_image(value)
        assert (decoded[:20] == 255).all()
        blend = rgba[20:30, :, :3] * 0.2 + 255 * 0.8
        assert np.abs(decoded[20:30] - blend).max() <= 1
        np.testing.assert_array_equal(decoded[30:], rgba[30:, :, :3])
    grey_alpha = np.dstack([np.zeros((4, 4), np.uint8), np.zeros((4, 4), np.uint8)])
    assert (images.decode_image(encode(grey_alpha, "PNG")) == 255).all()


def test_a_transparent_palette_entry_becomes_white():
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 1)
    decoded = images.decode_image(encode(palette, "PNG", transparency=0))
    assert decoded[0, 0].tolist() == [200, 100, 50]
    assert decoded[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(form):
    values = np.array([[0, 128, 129, 257], [1000, 32768, 65279, 65535]], np.uint16)
    expected = np.round(values / 257)
    np.testing.assert_array_equal(images.decode_image(encode(values, form))[..., 0], expected)
    np.testing.assert_array_equal(images.decode_image(values)[..., 1], expected)


def test_cmyk_jpeg():
    cmyk = Image.fromarray(picture()).convert("CMYK")
    decoded = images.decode_image(encode(cmyk, "JPEG", quality=95))
    assert np.abs(decoded.astype(int) - np.array(cmyk.convert("RGB"))).max() <= 25


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (images.decode_image(data) == [255, 0, 0]).all()


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
    decoded = images.decode_image(encode(image, form, exif=exif))
    assert decoded.shape == upright.shape
    assert np.abs(decoded.astype(int) - upright).mean() < 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_raise(form):
    data = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), form)
    with pytest.raises(Undecodable):
        images.decode_image(data[: len(data) // 2])


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
        images.decode_image(value)


def test_a_decompression_bomb_raises_before_it_is_decoded():
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2**13, 2**13 + 1, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(Undecodable, match="over the limit"):
        images.decode_image(data)


def huge_jpeg():
    """A JPEG of 8 x 8 pixels whose header claims 2**13 x (2**13 + 1)."""
    data = encode(np.zeros((8, 8, 3), np.uint8), "JPEG")
    place = data.index(b"\xff\xc0") + 5  # of height and width in the frame header
    return data[:place] + struct.pack(">HH", 2**13, 2**13 + 1) + data[place + 4 :]


def test_a_jpegs_full_size_is_checked_before_it_is_decoded_at_another():
    with pytest.raises(Undecodable, match="over the limit"):
        images.open_image(huge_jpeg())


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_shrunk_jpeg_is_the_picture_at_that_scale(factor, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(128, 240), "JPEG", quality=95, exif=exif)
    opened = images.open_image(data)
    assert opened.shrink(factor) == factor
    expected = Image.fromarray(images.decode_image(data)).reduce(factor)
    error = np.abs(np.asarray(opened.rgb(), int) - np.asarray(expected, int))
    assert error.mean() < 3
    data = encode(picture(121, 243), "JPEG", exif=exif)
    opened = images.open_image(data)
    opened.shrink(factor)
    assert opened.size == images.decode_image(data).shape[:2]  # the whole image's
    height, width = (-(-side // factor) for side in opened.size)
    assert opened.rgb().size == (width, height)


def test_what_cannot_be_shrunk_stays_whole():
    image = picture()
    for form in ("PNG", "WEBP", "BMP", "TIFF"):
        data = encode(image, form)
        opened = images.open_image(data)
        assert opened.shrink(4) == 1
        np.testing.assert_array_equal(np.asarray(opened.rgb()), images.decode_image(data))
    jpeg = encode(image, "JPEG")
    loaded = Image.open(io.BytesIO(jpeg))
    loaded.load()
    for value in (image, loaded):
        opened = images.open_image(value)
        assert opened.shrink(2) == 1 and opened.rgb().size == (60, 40)
    opened = images.open_image(jpeg)
    assert opened.shrink(1) == 1
    np.testing.assert_array_equal(np.asarray(opened.rgb()), images.decode_image(jpeg))


def test_grey_and_cmyk_jpegs_shrink():
    for mode in ("L", "CMYK"):
        opened = images.open_image(encode(Image.fromarray(picture()).convert(mode), "JPEG"))
        assert opened.shrink(2) == 2
        small = opened.rgb()
        assert small.mode == "RGB" and small.size == (30, 20)


def test_a_truncated_jpeg_raises_at_every_scale():
    data = encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "JPEG")
    for factor in (1, 2, 4, 8):
        opened = images.open_image(data[: len(data) // 2])
        opened.shrink(factor)
        with pytest.raises(Undecodable):
            opened.rgb()


def test_files_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encode(picture(), "PNG"))
    assert images.decode_image(path).shape == (40, 60, 3)
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(Undecodable, match="larger than 10"):
        images.decode_image(path)
