import io
import os
import struct

import numpy as np
import pytest
import soundfile

from bivl.core.errors import Undecodable
from bivl.data.audio import MAX_SECONDS, crop_or_pad, decode_audio, normalize


def sine(hertz=440.0, rate=16000, seconds=0.5):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype("f4")


def encoded(sound, rate=16000, kind="WAV", subtype=None):
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format=kind, subtype=subtype)
    return file.getvalue()


def reason(value, **options):
    with pytest.raises(Undecodable) as error:
        decode_audio(value, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "kind, subtype, near",
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.1),
    ],
)
def test_formats(tmp_path, kind, subtype, near):
    sound = sine()
    data = encoded(sound, kind=kind, subtype=subtype)
    path = tmp_path / f"sound.{kind.lower()}"
    path.write_bytes(data)
    decoded = decode_audio(data)
    assert decoded.dtype == np.float32 and decoded.shape == sound.shape
    np.testing.assert_allclose(decoded, sound, atol=near)
    for value in (str(path), path, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(decode_audio(value), decoded)


def test_long_file_is_read_in_blocks(monkeypatch):
    sound = sine(seconds=1)
    data = encoded(sound, kind="FLAC", subtype="PCM_24")
    monkeypatch.setattr("bivl.data.audio._BLOCK", 1000)
    np.testing.assert_allclose(decode_audio(data), sound, atol=1e-6)


def test_channels_are_averaged():
    left, right = sine(300), sine(500)
    stereo = np.stack([left, right], axis=1)
    data = encoded(stereo, subtype="FLOAT")
    np.testing.assert_allclose(decode_audio(data), (left + right) / 2, atol=1e-7)
    np.testing.assert_allclose(decode_audio(stereo), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_keeps_the_frequency(rate):
    decoded = decode_audio(encoded(sine(1000, rate, 1.0), rate, subtype="FLOAT"))
    assert len(decoded) == 16000
    spectrum = np.abs(np.fft.rfft(decoded * np.hanning(16000)))
    assert abs(int(spectrum.argmax()) - 1000) <= 1  # one bin is one hertz
    middle = slice(1000, 15000)
    np.testing.assert_allclose(decoded[middle], sine(1000, 16000, 1.0)[middle], atol=0.01)


def test_resampling_leaves_no_alias():
    decoded = decode_audio(encoded(sine(12000, 48000, 1.0), 48000, subtype="FLOAT"))
    assert np.abs(decoded[1000:15000]).max() < 0.005  # 12 kHz would fold to 4 kHz at half scale


def test_arrays():
    sound = sine()
    np.testing.assert_array_equal(decode_audio(sound), sound)
    np.testing.assert_array_equal(decode_audio(sound.astype(np.float64)), sound)
    for dtype in (np.int16, np.int64):
        values = np.array([-32768, 0, 16384], dtype)
        np.testing.assert_array_equal(decode_audio(values), np.float32([-1, 0, 0.5]))
    assert "beyond 16 bit" in reason(np.array([2**15]))
    assert "uint8" in reason(np.zeros(4, np.uint8))
    assert "shape (2, 100)" in reason(np.zeros((2, 100)))  # channels first
    assert "shape ()" in reason(np.array(1.0))
    assert "empty" in reason(np.zeros(0, np.float32))
    assert "NaN" in reason(np.array([0, np.nan]))
    assert "infinite" in reason(np.array([0, 1e300]))
    assert "over the limit" in reason(np.broadcast_to(np.float32(0), (MAX_SECONDS * 16000 + 1,)))
    assert "list is no sound" in reason([0.0])


def test_damaged_files(tmp_path):
    flac, ogg = encoded(sine(), kind="FLAC"), encoded(sine(), kind="OGG")
    for data in (flac[: len(flac) // 2], ogg[: len(ogg) // 2], b"RIFF", b"fLaC" + bytes(100)):
        assert "0x" not in reason(data)
    hole = bytearray(flac)
    hole[len(flac) // 2 : len(flac) // 2 + 200] = bytes(200)
    assert reason(bytes(hole))
    text = tmp_path / "text.wav"
    text.write_text("this is no sound at all, but a long enough text")
    assert "no WAV" in reason(str(text)) and "no WAV" in reason(b"")
    assert "No such file" in reason(str(tmp_path / "none.wav"))
    assert "no file" in reason(tmp_path)
    assert reason("a\0b.wav")
    assert "NaN" in reason(encoded(np.float32([0, np.nan, 1]), subtype="FLOAT"))
    assert "NaN" in reason(encoded(np.float32([0, np.nan, 1]), 8000, subtype="FLOAT"))
    assert "empty" in reason(encoded(sine()[:0]))


def test_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    assert "no file" in reason(tmp_path / "pipe.wav")  # and the test would hang otherwise


def test_lying_headers():
    wav = bytearray(encoded(sine()))
    struct.pack_into("<I", wav, 40, 2**32 - 16)  # the size of the data: 2**31 frames
    assert len(decode_audio(bytes(wav))) == 8000  # only what is there
    assert len(decode_audio(bytes(wav[: 44 + 2000]))) == 1000
    struct.pack_into("<I", wav, 24, 4_000_000)
    assert "rate of 4000000 Hz" in reason(bytes(wav))
    struct.pack_into("<I", wav, 24, 0)
    assert reason(bytes(wav))
    flac = bytearray(encoded(sine(), kind="FLAC"))
    flac[21] |= 0x0F  # the lowest 36 bits before the checksum count the frames
    flac[22:26] = b"\xff" * 4
    assert "over the limit" in reason(bytes(flac))
    flac[21] &= 0xF0
    flac[22:26] = struct.pack(">I", 9000)
    assert reason(bytes(flac))  # 1,000 frames fewer than announced
    assert "17 channels" in reason(encoded(np.zeros((10, 17), np.float32)))


def test_limits_are_checked_before_decoding(monkeypatch):
    monkeypatch.setattr("bivl.data.audio.MAX_FRAMES", 100)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("decoded"))
    assert "100 frames" in reason(encoded(sine()))


def test_normalize():
    sound = np.random.default_rng(0).normal(3.0, 0.2, 5000).astype(np.float32)
    normal = normalize(sound)
    assert normal.dtype == np.float32
    np.testing.assert_allclose(normal.mean(dtype=np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(normal.var(dtype=np.float64), 1, atol=1e-3)
    np.testing.assert_array_equal(normalize(np.full(10, 0.25, np.float32)), np.zeros(10))
    # Two samples: the biased variance is 1, so both are 1 / sqrt(1 + 1e-5) from the middle.
    expected = np.float32([-1, 1]) / np.sqrt(1 + 1e-5)
    np.testing.assert_allclose(normalize(np.float32([1, 3])), expected, rtol=1e-6)


def test_crop_or_pad():
    sound = np.arange(1, 11, dtype=np.float32)
    head, valid = crop_or_pad(sound, 4)
    assert valid == 4 and head.tolist() == [1, 2, 3, 4]
    padded, valid = crop_or_pad(sound, 12, np.random.default_rng(0))
    assert valid == 10 and padded.tolist() == [*range(1, 11), 0, 0] and padded.dtype == np.float32
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(200):
        crop, valid = crop_or_pad(sound, 8, rng)
        assert valid == 8 and np.all(np.diff(crop) == 1)
        starts.add(crop[0])
    assert starts == {1, 2, 3}  # the last window is reached too
    whole, valid = crop_or_pad(sound, 10, rng)
    assert valid == 10 and np.array_equal(whole, sound)
