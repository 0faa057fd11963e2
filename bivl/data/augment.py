"""What is done to images on the host: random crops and colours for training, the centre view for
evaluation.

Pictures are upright RGB images of Pillow, as `images.Opened.rgb` gives them, and stay so from one
step to the next: Pillow stores a pixel as four bytes, so that every array made of a picture is a
copy. Pillow does the pixel work, because the references' numbers were made with it (torchvision
transforms on PIL images).
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
_HUE = len(_ENHANCERS)


@dataclasses.dataclass(frozen=True)
class View:
    """What training sees of an image, drawn from its size before its pixels are decoded.

    changes: colour changes of the whole image in their order, as `draw_jitter` gives them.
    mirrored: whether left and right are exchanged.
    window: top, left, height and width of the part that is cut out, before it is mirrored.
    """

    changes: tuple[tuple[int, float], ...]
    mirrored: bool
    window: tuple[int, int, int, int]

    def shrinkage(self, size: tuple[int, int]) -> int:
        """The largest of 8, 4, 2 and 1 by which the window can shrink and still cover `size`."""
        _, _, h, w = self.window
        return next((k for k in (8, 4, 2) if h // k >= size[0] and w // k >= size[1]), 1)

    def shrunk(self, factor: int) -> "View":
        """The same view of a picture of 1 / factor of the size, to within one of its pixels."""
        top, left, h, w = self.window
        edges = (top, left, top + h, left + w)
        top, left, bottom, right = ((edge + factor // 2) // factor for edge in edges)
        return dataclasses.replace(self, window=(top, left, bottom - top, right - left))


def draw_view(
    rng: np.random.Generator,
    size: tuple[int, int],
    color_jitter: Sequence[float] = (0.0, 0.0, 0.0),
    flip: bool = False,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> View:
    """The view of an image of `size` = (H, W): jitter, flip at 1/2, window, in BEiT's order."""
    height, width = size
    changes = draw_jitter(rng, *color_jitter) if any(color_jitter) else ()
    mirrored = flip and rng.random() < 0.5
    top, left, h, w = crop_window(rng, height, width, scale, ratio)
    # The window is drawn in the mirror image.
    return View(changes, mirrored, (top, width - left - w if mirrored else left, h, w))


def show(
    picture: Image.Image, view: View, size: tuple[int, int], interpolation: str = "bicubic"
) -> Image.Image:
    """The view of a picture, resized to `size` = (h, w)."""
    top, left, h, w = view.window
    picture = change_colors(picture, view.changes).crop((left, top, left + w, top + h))
    if view.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return resize(picture, size, interpolation)


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


def draw_jitter(
    rng: np.random.Generator,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
) -> tuple[tuple[int, float], ...]:
    """Colour changes in random order: (property, factor), a strength of 0 leaves one out.

    Properties are numbered as the arguments. Brightness, contrast and saturation are multiplied by
    factors uniform in [max(0, 1 - v), 1 + v], the hue is turned by a part of the circle uniform in
    [-hue, hue] (hue <= 0.5). Source: torchvision ColorJitter on uint8 PIL images.
    """
    strengths = (brightness, contrast, saturation, hue)
    if min(strengths) < 0 or hue > 0.5:
        raise ValueError(f"strengths {strengths} must not be negative, nor hue over 0.5")
    order = rng.permutation(4).tolist()
    factors = [rng.uniform(max(0.0, 1 - v), 1 + v) for v in strengths[:_HUE]]
    factors.append(rng.uniform(-hue, hue))
    return tuple((k, factors[k]) for k in order if strengths[k])


def change_colors(picture: Image.Image, changes: Sequence[tuple[int, float]]) -> Image.Image:
    """Makes the changes that `draw_jitter` drew."""
    for k, factor in changes:
        if k == _HUE:
            picture = _turn_hue(picture, factor)
        else:
            picture = _ENHANCERS[k](picture).enhance(factor)
    return picture


def _turn_hue(picture: Image.Image, turn: float) -> Image.Image:
    """Adds `turn` (a part of the circle) to the 8 bit hue, wrapping around."""
    hue, saturation, value = picture.convert("HSV").split()
    turned = np.array(hue) + np.uint8(int(turn * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def resize(
    picture: Image.Image, size: tuple[int, int], interpolation: str = "bicubic"
) -> Image.Image:
    """Resizes to `size` = (h, w) with Pillow's antialiasing filter of that name."""
    return picture.resize((size[1], size[0]), Image.Resampling[interpolation.upper()])


def resize_shorter(picture: Image.Image, size: int, interpolation: str = "bicubic") -> Image.Image:
    """Resizes so that the shorter side is `size`; the longer is rounded down, as in torchvision."""
    width, height = picture.size
    if height <= width:
        return resize(picture, (size, int(size * width / height)), interpolation)
    return resize(picture, (int(size * height / width), size), interpolation)


def center_crop(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Cuts out the centre; a side that is too short is padded with black, as in torchvision."""
    h, w = size
    top, left = _margin(picture.height - h), _margin(picture.width - w)
    return picture.crop((left, top, left + w, top + h))


def _margin(surplus: int) -> int:
    """What is cut off before the centre, or negative, padded."""
    return round(surplus / 2) if surplus > 0 else -(-surplus // 2)


def center_view(
    picture: Image.Image, size: int, crop_ratio: float = 0.875, interpolation: str = "bicubic"
) -> Image.Image:
    """The deterministic view for evaluation: size x size pixels.

    The shorter side becomes size / crop_ratio (rounded down), then the centre is cut out. An
    image that already fits into size x size is only resized (crop_ratio 1): cutting the rim off
    a picture that must be enlarged would only lose what little it shows.
    """
    if max(picture.size) <= size:
        crop_ratio = 1.0
    whole = resize_shorter(picture, int(size / crop_ratio), interpolation)
    return center_crop(whole, (size, size))
