"""Images on the host: decoding, random crops and colours for training, the centre view for eval.

Every function takes and gives uint8 RGB arrays [H, W, 3]. Pillow does the pixel work, because the
references' numbers were made with it (torchvision transforms on PIL images).
"""

import io
import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance, UnidentifiedImageError

from bivl.core.errors import Undecodable

MAX_PIXELS = 2**26
# A fixed list, since other Pillow plugins start programs (EPS) or are rarely exercised.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(value) -> np.ndarray:
    """Decodes to uint8 RGB [H, W, 3]; the first frame of an animation.

    Grey, palette, CMYK and 16 bit images become 8 bit RGB (16 bit by v / 257, rounded), alpha is
    composited on white, EXIF rotation is applied.

    Args:
      value: encoded bytes, a path, a PIL image, or an array: uint8 or uint16 [H, W], or uint8
        [H, W, 1 | 2 | 3 | 4].

    Raises:
      Undecodable: damaged or truncated data, an unknown format, more than 2**26 pixels
        (checked before the pixels are decoded), an empty image, float or 32 bit pixels.
    """
    try:
        if isinstance(value, np.ndarray):
            return _array_to_rgb(value)
        if isinstance(value, Image.Image):
            return _image_to_rgb(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            value = io.BytesIO(value)
        elif not isinstance(value, (str, os.PathLike)):
            raise Undecodable(f"a {type(value).__name__} is no image")
        with Image.open(value, formats=_FORMATS) as image:
            return _image_to_rgb(image)
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable("this is no image of a known format") from error
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _check_size(height: int, width: int):
    if height * width > MAX_PIXELS:
        raise Undecodable(f"{width}x{height} pixels are over the limit of {MAX_PIXELS}")
    if height * width == 0:
        raise Undecodable(f"an image of {width}x{height} pixels is empty")


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise Undecodable(f"an array of shape {array.shape} is no image [H, W] or [H, W, C]")
    _check_size(*array.shape[:2])
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
        return array
    if array.dtype == np.uint8 or (array.dtype == np.uint16 and array.ndim == 2):
        return _image_to_rgb(Image.fromarray(np.ascontiguousarray(array)))
    raise Undecodable(f"pixels of type {array.dtype} are not supported, use uint8")


def _image_to_rgb(image: Image.Image) -> np.ndarray:
    _check_size(image.height, image.width)
    image.load()
    orientation = _orientation(image)  # after load(): Pillow turns TIFF files by itself there
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
    elif image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba)
    if image.mode != "RGB":
        image = image.convert("RGB")
    if orientation in _TRANSPOSE:
        image = image.transpose(_TRANSPOSE[orientation])
    return np.array(image)


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged metadata is no reason to lose the picture
        return 1


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scales 16 bit grey to 8 bit; Pillow's own conversion would clip at 255."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise Undecodable(f"pixels of mode {image.mode} (32 bit) are not supported")
    return Image.fromarray(((values.astype(np.uint32) + 128) // 257).astype(np.uint8))


def resize(image: np.ndarray, size: tuple[int, int], interpolation: str = "bicubic") -> np.ndarray:
    """Resizes [H, W, 3] to `size` = (h, w) with Pillow's antialiasing filter of that name."""
    if image.shape[:2] == tuple(size):
        return image
    resample = Image.Resampling[interpolation.upper()]
    return np.array(Image.fromarray(image).resize((size[1], size[0]), resample))


def crop_window(
    rng: np.random.Generator,
    height: int,
    width: int,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """The (top, left, h, w) of a random resized crop.

    Area uniform in `scale` times the image, width / height log-uniform in `ratio`; after ten
    windows that do not fit, the largest central one within `ratio`. Source: torchvision
    RandomResizedCrop.get_params.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            left = int(rng.integers(0, width - w, endpoint=True))
            return top, left, h, w
    h, w = height, width
    if width / height < min(ratio):
        h = round(w / min(ratio))
    elif width / height > max(ratio):
        w = round(h * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def random_resized_crop(
    image: np.ndarray,
    rng: np.random.Generator,
    size: int | tuple[int, int],
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Crops a window as `crop_window` draws it and resizes it to `size` (one number = square)."""
    top, left, h, w = crop_window(rng, image.shape[0], image.shape[1], scale, ratio)
    window = np.ascontiguousarray(image[top : top + h, left : left + w])
    return resize(window, _pair(size), interpolation)


def horizontal_flip(
    image: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> np.ndarray:
    """Mirrors left and right with this probability; the mirror image is a view, to be cropped."""
    return image[:, ::-1] if rng.random() < probability else image


def color_jitter(
    image: np.ndarray,
    rng: np.random.Generator,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> np.ndarray:
    """Changes colours in random order; a strength of 0 leaves that property alone.

    Brightness, contrast and saturation are multiplied by factors uniform in
    [max(0, 1 - v), 1 + v], the hue is turned by a part of the circle uniform in [-hue, hue]
    (hue <= 0.5). Source: torchvision ColorJitter on uint8 PIL images.
    """
    strengths = (brightness, contrast, saturation, hue)
    if min(strengths) < 0 or hue > 0.5:
        raise ValueError(f"strengths {strengths} must not be negative, nor hue over 0.5")
    order = rng.permutation(4).tolist()
    # All factors are drawn before any is used, so the draws do not depend on the order.
    factors = [rng.uniform(max(0.0, 1 - v), 1 + v) for v in strengths[:3]]
    factors.append(rng.uniform(-hue, hue))
    picture = Image.fromarray(image)
    for k in order:
        if strengths[k] == 0:
            continue
        if k == 3:
            picture = _turn_hue(picture, factors[3])
        else:
            enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[k]
            picture = enhance(picture).enhance(factors[k])
    return np.array(picture)


def _turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Adds `turn` (a part of the circle) to the 8 bit hue, wrapping around."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.array(hue) + np.uint8(int(turn * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def resize_shorter(image: np.ndarray, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Resizes so that the shorter side is `size`; the longer is rounded down, as in torchvision."""
    height, width = image.shape[:2]
    if height <= width:
        return resize(image, (size, int(size * width / height)), interpolation)
    return resize(image, (int(size * height / width), size), interpolation)


def center_crop(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Cuts out the centre; a side that is too short is padded with black, as in torchvision."""
    h, w = _pair(size)
    height, width = image.shape[:2]
    if height < h or width < w:
        more = max(h - height, 0), max(w - width, 0)
        image = np.pad(image, [(m // 2, (m + 1) // 2) for m in more] + [(0, 0)])
        height, width = image.shape[:2]
    top, left = round((height - h) / 2), round((width - w) / 2)
    return np.ascontiguousarray(image[top : top + h, left : left + w])


def center_view(
    image: np.ndarray, size: int, crop_ratio: float = 0.875, interpolation: str = "bicubic"
) -> np.ndarray:
    """The deterministic view for evaluation: uint8 [size, size, 3].

    The shorter side becomes size / crop_ratio (rounded down), then the centre is cut out. An
    image that already fits into size x size is only resized (crop_ratio 1): cutting the rim off
    a picture that must be enlarged would only lose what little it shows.
    """
    if max(image.shape[:2]) <= size:
        crop_ratio = 1.0
    return center_crop(resize_shorter(image, int(size / crop_ratio), interpolation), size)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, (int, np.integer)) else (int(size[0]), int(size[1]))
