"""Images as they are stored: files, bytes and arrays to upright 8 bit RGB.

Pillow decodes, because the references' numbers were made with it (torchvision on PIL images).
"""

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from bivl.core.errors import Undecodable

MAX_PIXELS = 2**26
MAX_BYTES = 2**28  # 256 MiB; whatever is larger is no training image
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
_LYING = (5, 6, 7, 8)  # orientations that exchange height and width


@contextlib.contextmanager
def _damaged() -> Iterator[None]:
    """Whatever fails in decoding is Undecodable."""
    try:
        yield
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable("this is no image of a known format") from error
    except Exception as error:  # Pillow raises a dozen types on damaged files
        raise Undecodable(f"{type(error).__name__}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Opened:
    """An image whose size is known and allowed; a JPEG's pixels are decoded when asked for.

    size: height and width in pixels, upright.
    """

    image: Image.Image
    orientation: int  # EXIF's
    size: tuple[int, int]

    def shrink(self, factor: int) -> int:
        """Has a JPEG decoded at 1 / factor of its size by its own inverse transform.

        Returns the factor (1, 2, 4 or 8), or 1 where the image cannot be.
        """
        size = self.image.width // factor, self.image.height // factor
        return factor if factor > 1 and self.image.draft(self.image.mode, size) else 1

    @_damaged()
    def rgb(self) -> Image.Image:
        """Upright, 8 bit, RGB: grey, palette, CMYK and 16 bit images are converted (16 bit by
        v / 257, rounded), alpha is composited on white. Undecodable where the data are damaged."""
        image = self.image
        image.load()
        if image.mode == "F" or image.mode.startswith("I"):
            image = _eight_bit(image)
        elif image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba)
        if image.mode != "RGB":
            image = image.convert("RGB")
        if self.orientation in _TRANSPOSE:
            image = image.transpose(_TRANSPOSE[self.orientation])
        return image


@_damaged()
def open_image(value: Any) -> Opened:
    """Opens an image; the first frame of an animation.

    Args:
      value: encoded bytes, a path, a PIL image, or an array: uint8 or uint16 [H, W], or uint8
        [H, W, 1 | 2 | 3 | 4].

    Raises:
      Undecodable: damaged or truncated data, an unknown format, more than 2**26 pixels
        (checked before the pixels are decoded), an empty image, float or 32 bit pixels. What a
        JPEG's pixels raise comes with `rgb`.
    """
    image = _open(value)
    _check_size(image.height, image.width)
    if not isinstance(image, JpegImageFile):
        image.load()  # before EXIF is read: Pillow turns TIFF files by itself there
    orientation = _orientation(image)
    turned = orientation in _LYING
    return Opened(image, orientation, image.size if turned else (image.height, image.width))


def decode_image(value: Any) -> np.ndarray:
    """The pixels of what `open_image` takes: uint8 RGB [H, W, 3], upright."""
    return np.array(open_image(value).rgb())


def read_file(path: str | os.PathLike) -> bytes:
    """A file's bytes; Undecodable where it cannot be read or has more than MAX_BYTES."""
    try:
        with open(path, "rb") as file:
            # No more than there is: Python makes room for all that is asked for.
            data = file.read(min(os.fstat(file.fileno()).st_size, MAX_BYTES) + 1)
    except OSError as error:
        raise Undecodable(f"{type(error).__name__}: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise Undecodable(f"the file is larger than {MAX_BYTES} bytes")
    return data


def _open(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, np.ndarray):
        return _from_array(value)
    if isinstance(value, (str, os.PathLike)):
        value = read_file(value)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise Undecodable(f"a {type(value).__name__} is no image")
    return Image.open(io.BytesIO(value), formats=_FORMATS)


def _check_size(height: int, width: int):
    if height * width > MAX_PIXELS:
        raise Undecodable(f"{width}x{height} pixels are over the limit of {MAX_PIXELS}")
    if height * width == 0:
        raise Undecodable(f"an image of {width}x{height} pixels is empty")


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)):
        raise Undecodable(f"an array of shape {array.shape} is no image [H, W] or [H, W, C]")
    _check_size(*array.shape[:2])
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 and (array.dtype != np.uint16 or array.ndim != 2):
        raise Undecodable(f"pixels of type {array.dtype} are not supported, use uint8")
    return Image.fromarray(np.ascontiguousarray(array))


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
