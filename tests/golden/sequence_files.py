"""Packing and loading of the recorded numbers of data2vec on text and audio.

A file has arrays as they are, and groups of arrays by parameter name. A group would be hundreds of
small files in an archive, so it is one vector of whole numbers, in the order of `names`, and a
power of two for each name that they count. Large parameters after steps are samples, see README.md.
"""

from pathlib import Path

import numpy as np

GROUPS = ("param", "teacher_param", "grad", "step2/param", "step2/teacher_param")
SAMPLED = {"step2/param": 13, "step2/teacher_param": 13}  # every 13th, in C order, is recorded
SMALL = 256  # elements; up to here all of them are


def load(name: str) -> dict[str, np.ndarray]:
    """Every array of `<name>.npz` by its key; a group has a key `<group>/<parameter>` for each.

    Places that a sample leaves out are NaN.
    """
    with np.load(Path(__file__).with_name(f"{name}.npz"), allow_pickle=False) as file:
        arrays = dict(file)
    shapes = {
        name: tuple(int(number) for number in shape.split())
        for name, shape in zip(arrays.pop("names"), arrays.pop("shapes"), strict=True)
    }
    for group in GROUPS:
        flat, start = arrays.pop(group), 0
        scales = arrays.pop(f"{group}/scale")
        for (name, shape), scale in zip(shapes.items(), scales, strict=True):
            if scale == 0:  # the group lacks this parameter
                continue
            value = np.full(int(np.prod(shape)), np.nan, np.float32)
            part = value[recorded(group, value.size)]
            part[:] = flat[start : start + part.size] * scale
            start += part.size
            arrays[f"{group}/{name}"] = value.reshape(shape)
        assert start == flat.size, (group, start, flat.size)
    return arrays


def recorded(group: str, size: int) -> slice:
    """Which elements of a parameter of `size` elements a group has."""
    return slice(None, None, SAMPLED.get(group, 1) if size > SMALL else 1)


def pack(group: str, values: dict, shapes: dict, bits: int | None, step: float) -> dict:
    """The two arrays of a group, from `values` by parameter name.

    `bits`: a step is the largest element's power of two divided by 2^bits; None: it is `step`,
    which is the smallest in any case.
    """
    flat, scales = [], []
    for name in shapes:
        if name not in values:
            scales.append(0.0)
            continue
        value, scale = np.asarray(values[name], np.float64).ravel(), step
        if bits is not None:
            scale = max(step, 2.0 ** (np.ceil(np.log2(np.abs(value).max() + 1e-30)) - bits))
        flat.append(np.round(value[recorded(group, value.size)] / scale))
        scales.append(scale)
    counts = np.concatenate(flat)
    kind = np.int16 if np.abs(counts).max() < 2**15 else np.int32
    return {group: counts.astype(kind), f"{group}/scale": np.array(scales, np.float32)}
