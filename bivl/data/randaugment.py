"""RandAugment and the boxes of random erasing, as fine-tuning recipes use them.

Both follow timm (huggingface/pytorch-image-models: timm/data/auto_augment.py, random_erasing.py),
whose names the published recipes quote: RandAugment `rand-m9-mstd0.5-inc1` and erasing in mode
`pixel`. Papers: arXiv 1909.13719 and 1708.04896. There the order is crop, flip, RandAugment,
normalise, erase, Mixup.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from bivl.core.errors import UserError

_RANDOM = ("bilinear", "bicubic")
_ATTEMPTS = 10  # boxes tried before an image stays whole


def rand_augment(
    picture: Image.Image,
    rng: np.random.Generator,
    magnitude: float = 9.0,
    std: float = 0.5,
    layers: int = 2,
    increasing: bool = True,
    probability: float = 0.5,
    fill: Sequence[int] = (128, 128, 128),
    interpolation: str = "bicubic",
) -> Image.Image:
    """Changes an RGB picture by `layers` operations, each of which is skipped at 1 - probability.

    Operations are drawn evenly and with replacement from the 15 of OPERATIONS. Each takes its own
    magnitude from a normal distribution, clipped to [0, 10].

    Args:
      picture: RGB, of Pillow.
      rng: source of randomness.
      magnitude: mean of the magnitudes (m9).
      std: their standard deviation (mstd0.5).
      layers: operations an image (timm's default: 2).
      increasing: all operations grow with the magnitude (inc1); otherwise posterize, solarize and
        the four enhancers have the scale of the TensorFlow original.
      probability: that a drawn operation is applied.
      fill: colour of the pixels that rotating, shearing and moving bring in; timm takes
        round(255 * mean) of the normalisation.
      interpolation: of the same operations: bilinear, bicubic or, drawn for each, random. timm
        takes that of the crop: the recipes of BEiT, data2vec and MAE say bicubic.
    """
    if interpolation not in (*_RANDOM, "random"):
        raise UserError(
            f"config.augment.interpolation={interpolation!r} is unknown; use bilinear, bicubic or "
            "random"
        )
    names = list(OPERATIONS)
    for index in rng.integers(len(names), size=layers):
        if rng.random() > probability:
            continue
        level = min(max(rng.normal(magnitude, std), 0.0), 10.0) / 10
        argument = strength(names[index], level, rng, increasing)
        chosen = _RANDOM[rng.integers(2)] if interpolation == "random" else interpolation
        resample = Image.Resampling[chosen.upper()]
        options = {"resample": resample, "fillcolor": tuple(int(value) for value in fill)}
        picture = OPERATIONS[names[index]](picture, argument, options)
    return picture


def rand_augment_pairs(
    picture: Image.Image, rng: np.random.Generator, level: float = 7.0, layers: int = 2
) -> Image.Image:
    """RandAugment of images with texts, as BEiT-3 is tuned (microsoft/unilm `beit3/randaug.py`).

    `layers` operations, drawn evenly and with replacement from PAIRED, none of which changes
    hues, each skipped at one half, and all at `level` of 10: shears of 0.3 level / 10, turns of 30
    level / 10 degrees, moves of `level` pixels, factors of 0.1 + 1.8 level / 10; grey comes in.
    """
    options = {"resample": Image.Resampling.BILINEAR, "fillcolor": (128,) * 3}
    sides = {"translate_x": picture.width, "translate_y": picture.height}
    for index in rng.integers(len(PAIRED), size=layers):
        name = PAIRED[index]
        if rng.random() > 0.5 or name == "identity":
            continue
        if name in sides:  # moves are parts of the side elsewhere, and pixels here
            argument = rng.choice((-1, 1)) * level / sides[name]
        else:
            argument = strength(name, level / 10, rng, increasing=False)
        picture = OPERATIONS[name](picture, argument, options)
    return picture


def strength(name: str, level: float, rng: np.random.Generator, increasing: bool = True):
    """The argument of an operation at `level` in [0, 1]; None for one that takes none.

    rotate: degrees, +-30. shear: pixels a pixel, +-0.3. translate: part of the side, +-0.45.
    posterize: bits kept, 4 to 0. solarize: threshold, 256 to 0. solarize_add: added value, 0 to
    110. Enhancers: factor 1 +- 0.9. Not increasing: bits 0 to 4, threshold 0 to 256, factor 0.1 to
    1.9, so that in the middle of the scale nothing happens.
    """
    if name in _SIGNED:
        value = _SIGNED[name] * level
        return -value if rng.random() > 0.5 else value
    if name == "posterize":
        bits = int(level * 4)
        return 4 - bits if increasing else bits
    if name == "solarize":
        threshold = int(level * 256)
        return 256 - threshold if increasing else threshold
    if name == "solarize_add":
        return int(level * 110)
    if name in _ENHANCERS:
        if not increasing:
            return 0.1 + 1.8 * level
        change = 0.9 * level
        return 1.0 - change if rng.random() > 0.5 else 1.0 + change
    return None


PAIRED = (
    *("identity", "auto_contrast", "equalize", "brightness", "sharpness"),
    *("shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
)
_SIGNED = {
    "rotate": 30.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 0.45,
    "translate_y": 0.45,
}
_ENHANCERS = {
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "brightness": ImageEnhance.Brightness,
    "sharpness": ImageEnhance.Sharpness,
}


def _affine(picture: Image.Image, matrix: tuple, options: dict[str, Any]) -> Image.Image:
    """The pixel at (x, y) comes from (a x + b y + c, d x + e y + f), matrix = (a, ..., f)."""
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix, **options)


def _solarize_add(picture: Image.Image, value: int, options: dict[str, Any]) -> Image.Image:
    """Adds `value` to dark channels (below 128)."""
    table = [min(255, i + value) if i < 128 else i for i in range(256)]
    return picture.point(table * 3)


def _posterize(picture: Image.Image, bits: int, options: dict[str, Any]) -> Image.Image:
    """Keeps the highest bits of each channel; none are black, which ImageOps.posterize refuses."""
    return picture.point([i & (256 - 2 ** (8 - bits)) for i in range(256)] * 3)


def _enhance(kind: Any) -> Callable:
    return lambda picture, value, options: kind(picture).enhance(value)


# Picture, argument from `strength`, options of resampling -> picture.
OPERATIONS: dict[str, Callable[[Image.Image, Any, dict[str, Any]], Image.Image]] = {
    "auto_contrast": lambda p, value, options: ImageOps.autocontrast(p),
    "equalize": lambda p, value, options: ImageOps.equalize(p),
    "invert": lambda p, value, options: ImageOps.invert(p),
    "rotate": lambda p, value, options: p.rotate(value, **options),
    "posterize": _posterize,
    "solarize": lambda p, value, options: ImageOps.solarize(p, value),
    "solarize_add": _solarize_add,
    **{name: _enhance(kind) for name, kind in _ENHANCERS.items()},
    "shear_x": lambda p, value, options: _affine(p, (1, value, 0, 0, 1, 0), options),
    "shear_y": lambda p, value, options: _affine(p, (1, 0, 0, value, 1, 0), options),
    "translate_x": lambda p, value, options: _affine(p, (1, 0, value * p.width, 0, 1, 0), options),
    "translate_y": lambda p, value, options: _affine(p, (1, 0, 0, 0, 1, value * p.height), options),
}


def erasing_box(
    rng: np.random.Generator,
    size: tuple[int, int],
    probability: float = 0.25,
    area: Sequence[float] = (0.02, 1 / 3),
    aspect: Sequence[float] = (0.3, 1 / 0.3),
) -> np.ndarray:
    """The rectangle to erase of an image of `size` = (H, W): int32 [4] = top, left, height, width.

    All zeros where nothing is erased. The noise N(0, 1) belongs on the normalised image, and
    images travel as uint8: so only the box is drawn here, and `objectives.mixing.erase` fills it
    on the device after normalising, which is the same in distribution. Area uniform in `area` times
    the image, height / width log-uniform in `aspect`; a box that does not fit with a pixel to spare
    is drawn again, up to ten times.
    """
    height, width = size
    if rng.random() > probability:
        return np.zeros(4, np.int32)
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_ATTEMPTS):
        wanted = rng.uniform(area[0], area[1]) * height * width
        ratio = math.exp(rng.uniform(low, high))
        h, w = round(math.sqrt(wanted * ratio)), round(math.sqrt(wanted / ratio))
        if h < height and w < width:
            top = rng.integers(height - h, endpoint=True)
            left = rng.integers(width - w, endpoint=True)
            return np.array([top, left, h, w], np.int32)
    return np.zeros(4, np.int32)
