"""Sound on the host: decoding to mono float32, normalising, crops of a fixed length."""

import io
import math
import os
import stat

import numpy as np
import scipy.signal
import soundfile

from bivl.core.errors import Undecodable

RATE = 16_000  # Hz; the rate of every published model (data2vec, wav2vec 2.0, HuBERT)
SUFFIXES = (".wav", ".flac", ".ogg")
MAX_SECONDS = 3600
MAX_FRAMES = 2**28  # 1 GiB of mono float32; an hour at 48 kHz is 173 million
MAX_CHANNELS = 16
_RATES = range(1_000, 384_001)
# libsndfile knows thirty formats; the rest are rarely exercised, or need a rate from the caller.
_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS")
_BLOCK = 2**20  # frames decoded at a time, so that a lying header allocates little


def decode_audio(value, rate: int = RATE) -> np.ndarray:
    """Decodes to float32 [T], mono, at `rate` Hz.

    Channels are averaged, integer samples scaled to [-1, 1). Other rates are resampled with
    scipy's polyphase filter (`scipy.signal.resample_poly`). A WAV file that is shorter than its
    header says gives what is there: programs that write to a pipe cannot know the length.

    Args:
      value: an encoded WAV, FLAC or OGG file as bytes or as a path, or an array that is at `rate`
        already: float in [-1, 1] or integers in the range of int16, [T] or [T, channels].
      rate: Hz of the result.

    Raises:
      Undecodable: damaged data, another format, no samples, NaN or infinity; or over the limits,
        which are checked in the header before anything is decoded: MAX_SECONDS, MAX_FRAMES,
        MAX_CHANNELS, rates of 1 to 384 kHz.
    """
    try:
        if isinstance(value, np.ndarray):
            sound = _from_array(value, rate)
        elif isinstance(value, (bytes, bytearray, memoryview)):
            sound = _from_file(io.BytesIO(value), rate)
        elif isinstance(value, (str, os.PathLike)):
            sound = _from_path(value, rate)
        else:
            raise Undecodable(f"a {type(value).__name__} is no sound")
    except Undecodable:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # soundfile's are RuntimeErrors
        raise Undecodable(f"{type(error).__name__}: {_reason(error)}") from error
    if not np.isfinite(sound).all():
        raise Undecodable("the sound has samples that are NaN or infinite")
    return sound


def _reason(error: Exception) -> str:
    # In place of str(error), which has the address of a BytesIO in it.
    return getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)


def _from_array(array: np.ndarray, rate: int) -> np.ndarray:
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[1] > MAX_CHANNELS):
        raise Undecodable(f"an array of shape {array.shape} is no sound [T] or [T, channels]")
    _check(array.shape[0], rate, array.shape[1] if array.ndim == 2 else 1)
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, found later
            sound = array.astype(np.float32)
    elif array.dtype in (np.int16, np.int32, np.int64):  # TFDS has int16 values stored as int64
        if array.min() < -(2**15) or array.max() >= 2**15:
            raise Undecodable(
                f"{array.dtype} samples beyond 16 bit; scale them to float in [-1, 1]"
            )
        sound = array.astype(np.float32) / 2**15
    else:
        raise Undecodable(f"samples of type {array.dtype} are not supported, use float32 or int16")
    return _mono(sound) if sound.ndim == 2 else sound


def _from_path(path, rate: int) -> np.ndarray:
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
        raise Undecodable("this is no file")
    with open(path, "rb") as file:
        return _from_file(file, rate, path)


def _from_file(file, rate: int, path=None) -> np.ndarray:
    """Decodes an open file; through its path where it has one, which spares calls into Python."""
    if file.read(4) not in _MAGIC:
        raise Undecodable("this is no WAV, FLAC or OGG file")
    file.seek(0)
    with soundfile.SoundFile(os.fspath(path) if path else file) as sound:
        _check(sound.frames, sound.samplerate, sound.channels)
        blocks, left = [], sound.frames
        while left > 0:
            block = sound.read(min(_BLOCK, left), dtype="float32", always_2d=True)
            if not len(block):
                raise Undecodable(f"the data end {left} frames before the end that is announced")
            blocks.append(_mono(block))
            left -= len(block)
        found = sound.samplerate
    whole = np.concatenate(blocks) if len(blocks) > 1 else blocks[0]
    return whole if found == rate else _resample(whole, found, rate)


def _check(frames: int, rate: int, channels: int):
    if rate not in _RATES:
        raise Undecodable(f"a rate of {rate} Hz is outside {_RATES.start} to {_RATES.stop - 1}")
    if not 1 <= channels <= MAX_CHANNELS:
        raise Undecodable(f"{channels} channels are not within 1 to {MAX_CHANNELS}")
    if frames < 1:
        raise Undecodable("the sound is empty")
    if frames > min(MAX_FRAMES, MAX_SECONDS * rate):
        raise Undecodable(
            f"{frames} frames at {rate} Hz are over the limit of {MAX_SECONDS} seconds or "
            f"{MAX_FRAMES} frames"
        )


def _mono(frames: np.ndarray) -> np.ndarray:
    """[T, channels] -> [T]."""
    if frames.shape[1] == 1:
        return np.ascontiguousarray(frames[:, 0])
    with np.errstate(over="ignore", invalid="ignore"):
        return frames.mean(axis=1, dtype=np.float32)


def _resample(sound: np.ndarray, found: int, wanted: int) -> np.ndarray:
    common = math.gcd(found, wanted)
    with np.errstate(over="ignore", invalid="ignore"):
        resampled = scipy.signal.resample_poly(sound, wanted // common, found // common)
    return resampled.astype(np.float32)


def normalize(sound: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(variance + 1e-5) over the whole waveform, float32 [T] -> float32 [T].

    The variance is the biased one and both are taken in float64; silence becomes zeros. As
    `layer_norm` over the waveform in fairseq (`FileAudioDataset`, `normalize=True`).
    """
    wide = sound.astype(np.float64)
    wide -= wide.mean()
    return (wide / np.sqrt(np.mean(wide * wide) + 1e-5)).astype(np.float32)


def crop_or_pad(
    sound: np.ndarray, length: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, int]:
    """Brings a waveform [T] to `length` samples.

    Returns:
      (float32 [length], valid): a longer one is cropped, at random with `rng` and to its head
      without; a shorter one gets zeros behind. `valid` counts the samples that are no padding.
    """
    extra = len(sound) - length
    if extra >= 0:
        first = int(rng.integers(0, extra + 1)) if rng is not None else 0
        return sound[first : first + length].astype(np.float32), length
    padded = np.zeros(length, np.float32)
    padded[: len(sound)] = sound
    return padded, len(sound)
