import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from bivl.core import config as configs
from bivl.core.errors import Undecodable
from bivl.data import augment, images
from bivl.modalities import image

SIZE = 32
CONFIGS = pathlib.Path(configs.__file__).parents[2] / "configs"


def smooth(height=304, width=424):
    """Long waves, which look alike at every scale."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 50), np.cos(y / 60), np.sin((x + y) / 70)]
    return Image.fromarray((127 + 100 * np.stack(waves, -1)).astype(np.uint8))


def encode(picture, form="JPEG", orientation=1):
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture.save(file, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    return file.getvalue()


def config(scaled, **changes):
    c = configs.load(str(CONFIGS / "pretrain/data2vec2_image.py:smoke"))
    c.image_size, c.augment.flip, c.augment.scaled_decoding = SIZE, True, scaled
    c.augment.update({"scale": (0.05, 1.0)} | changes)
    return c


def seen(data, seed, scaled, **changes):
    """What training sees of an image, and the next random number."""
    rng = np.random.default_rng(seed)
    view = image.train_image(config(scaled, **changes))({"image": data}, rng)
    return view.astype(int), rng.random()


@pytest.fixture
def factors(monkeypatch):
    """The factors by which images were shrunk, as they are decoded."""
    found, shrink = [], images.Opened.shrink
    monkeypatch.setattr(
        images.Opened, "shrink", lambda *args: found.append(shrink(*args)) or found[-1]
    )
    return found


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_shows_the_same_window(orientation, factors):
    data = encode(smooth(), orientation=orientation)
    for seed in range(20):
        (whole, after), (scaled, then) = (seen(data, seed, on) for on in (False, True))
        assert after == then  # the same draws
        assert np.abs(whole - scaled).mean() < 3
        other, _ = seen(data, seed + 100, False)
        assert np.abs(whole - other).mean() > 5  # which another window is not
    assert len(factors) == 20 and {2, 4, 8} == set(factors)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sides_that_the_scale_does_not_divide(orientation, factors):
    # The last pixel of the scaled image is filled up, and where that one comes first after the
    # turn, all moves by a part of it.
    data = encode(smooth(297, 417), orientation=orientation)
    for seed in range(12):
        (whole, after), (scaled, then) = (seen(data, seed, on) for on in (False, True))
        assert after == then and np.abs(whole - scaled).mean() < 12
    assert max(factors) >= 4


def test_scaled_decoding_with_colours(factors):
    data, jitter = encode(smooth()), {"color_jitter": (0.4, 0.4, 0.4)}
    for seed in range(8):
        (whole, after), (scaled, then) = (seen(data, seed, on, **jitter) for on in (False, True))
        assert after == then and np.abs(whole - scaled).mean() < 4
    assert max(factors) > 1


def test_scaled_decoding_never_enlarges(factors):
    data = encode(smooth(2 * SIZE - 1, 300))
    for seed in range(8):
        (whole, _), (scaled, _) = (seen(data, seed, on) for on in (False, True))
        np.testing.assert_array_equal(whole, scaled)
    assert factors == [1] * 8


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_other_formats_are_decoded_whole(form, factors):
    data = encode(smooth(), form, orientation=6)
    for seed in range(4):
        (whole, _), (scaled, _) = (seen(data, seed, on) for on in (False, True))
        np.testing.assert_array_equal(whole, scaled)
    assert factors == [1] * 4


def test_damaged_files_are_undecodable_at_every_scale(factors):
    data = encode(smooth())
    for seed in range(6):
        with pytest.raises(Undecodable):
            seen(data[: len(data) // 2], seed, True)
    assert max(factors) > 1


def test_evaluation_decodes_whole(factors):
    record = {"image": encode(smooth())}
    whole, scaled = (image.eval_ops(config(on))(record)["image"] for on in (False, True))
    np.testing.assert_array_equal(whole, scaled)
    expected = augment.center_view(images.open_image(record["image"]).rgb(), SIZE, 1.0)
    np.testing.assert_array_equal(whole, np.asarray(expected))
    assert not factors


def test_every_config_of_images_can_decode_at_scale():
    found = [configs.load(str(path)) for path in sorted(CONFIGS.glob("*/[a-z]*.py"))]
    found = [c for c in found if "augment" in c]
    assert len(found) >= 11
    for c in found:
        assert c.augment.scaled_decoding is False
        configs.override(c, [("augment.scaled_decoding", "true")])
        assert c.augment.scaled_decoding is True
