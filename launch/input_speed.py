"""Images a second of one core: our input pipeline, PIL-style loading, and decoding alone.

    taskset -c 0 python launch/input_speed.py [--images=200] [--size=500x375] [--json]

Makes JPEGs of that size (quality 90, 4:2:0, coloured texture) in a temporary folder, each under
many names: grain takes longest to shuffle a small set. Each way reads as many, in turns, and the
best turn counts, in CPU seconds, which a busy machine stretches less than the clock's. `pipeline`
is what training runs: grain without threads, files, decode, flip, random resized crop to 224
pixels, masks, batches of 25; `pipeline_scaled` with augment.scaled_decoding, which changes nothing
where no window has 448 pixels both ways. `pil` is the same picture in a bare loop over bytes in
memory, as torchvision's transforms make it. The others only decode: Pillow, Pillow and OpenCV at
half size by the JPEG's own scaling, OpenCV (all of them libjpeg-turbo) and, where it is installed,
simplejpeg.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bivl import train
from bivl.core import config as configs
from bivl.data import augment

BATCH, TURNS, NAMES = 25, 5, 20_000


def textures(count: int, size: tuple[int, int]) -> list[bytes]:
    """JPEGs of coloured noise on several scales, which compress about as photographs do."""
    rng, files = np.random.default_rng(0), []
    for _ in range(count):
        total = np.zeros((size[1], size[0], 3))
        for cells in (4, 16, 64, 256):
            small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            total += np.asarray(small.resize(size, Image.Resampling.BICUBIC), float) / cells**0.5
        total = 255 * (total - total.min()) / np.ptp(total)
        stream = io.BytesIO()
        Image.fromarray(total.astype(np.uint8)).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def pil(data: bytes, rng) -> np.ndarray:
    """Decode, random resized crop and flip in Pillow alone."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, h, w = augment.crop_window(rng, image.height, image.width, (0.2, 1.0))
    image = image.crop((left, top, left + w, top + h))
    image = image.resize((224, 224), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)


def half(data: bytes) -> np.ndarray:
    """Half the size, by the inverse transform of 4 x 4 of a block's 8 x 8 coefficients."""
    image = Image.open(io.BytesIO(data))
    image.draft("RGB", (image.width // 2, image.height // 2))
    return np.array(image)


def decoders() -> dict:
    """{name: function of bytes} of what is installed."""
    found = {
        "decode_pil": lambda data: np.array(Image.open(io.BytesIO(data)).convert("RGB")),
        "decode_pil_half": half,
    }
    try:
        import cv2

        cv2.setNumThreads(1)
        flags = {"": cv2.IMREAD_COLOR, "_half": cv2.IMREAD_REDUCED_COLOR_2}
        for name, flag in flags.items():
            found[f"decode_opencv{name}"] = lambda data, flag=flag: cv2.imdecode(
                np.frombuffer(data, np.uint8), flag
            )
    except ImportError:
        pass
    try:
        import simplejpeg

        found["decode_simplejpeg"] = simplejpeg.decode_jpeg
    except ImportError:
        pass
    return found


def names(files: list[bytes], folder: str) -> None:
    """Writes the files into a class folder below `folder`, each under many names."""
    home = Path(folder, "train", "texture")
    home.mkdir(parents=True)
    for number in range(max(NAMES, len(files))):
        path, first = home / f"{number}.jpg", home / f"{number % len(files)}.jpg"
        if number < len(files):
            path.write_bytes(files[number])
        else:
            os.link(first, path)


def pipeline(folder: str, scaled: bool):
    """-> an iterator of training batches from class folders below `folder`."""
    config = configs.load("configs/pretrain/data2vec2_image.py:size=base")
    keys = {"data.kind": "folder", "data.name": "", "data.dir": folder, "loader.threads": 0}
    keys |= {"batch_size": BATCH, "masking.num_masks": 1, "augment.scaled_decoding": scaled}
    configs.override(config, [(name, str(value)) for name, value in keys.items()])
    return train.open_batches(config, train.build(config), 0)


def measure(count: int, size: tuple[int, int]) -> dict[str, float]:
    """{way: images a second of CPU time}."""
    files, rng, best = textures(count, size), np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        names(files, folder)
        ways = {}
        for name, scaled in {"pipeline": False, "pipeline_scaled": True}.items():
            batches = stack.enter_context(contextlib.closing(pipeline(folder, scaled)))
            ways[name] = lambda b=batches: [next(b) for _ in range(count // BATCH)]
        ways["pil"] = lambda: [pil(data, rng) for data in files]
        for name, decode in decoders().items():
            ways[name] = lambda decode=decode: [decode(data) for data in files]
        for _ in range(TURNS + 1):  # the first warms up
            for name, way in ways.items():
                start = time.process_time()
                way()
                best.setdefault(name, []).append(time.process_time() - start)
    return {name: count / min(seconds[1:]) for name, seconds in best.items()}


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help=f"a multiple of {BATCH}")
    parser.add_argument("--size", default="500x375", help="of the JPEGs, WIDTHxHEIGHT")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    report = measure(max(args.images // BATCH, 1) * BATCH, (width, height))
    if args.json:
        print(json.dumps(report))
    else:
        for name, rate in report.items():
            print(f"{name:20} {rate:,.0f} images/s")


if __name__ == "__main__":
    main()
