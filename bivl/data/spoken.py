"""An endless spoken language that nobody speaks, rendered from a number alone.

A source-filter synthesizer after Klatt (1980): a glottal pulse train with jitter and breath goes
through five formants that glide from sound to sound, noise through bands for friction and bursts.
The filters act on overlapping frames of the short-time Fourier transform, not sample by sample:
numpy does all frames at once, and the overlap makes them glide.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from bivl.core.errors import UserError
from bivl.data.table import Column, Table, refuse_name, setting, split_ranges

RATE = 16_000
# Two consonants, two vowels and an ending give four words: mila, mali, lima, lami. These have the
# same sounds in another order, so a mean over time tells the family but hardly the word.
_FAMILIES = ("ml ia ", "nt ou ", "sk ua n", "fb io ", "zp eu ", "dm oa s", "ls ei ", "kn uo ")
_FAMILIES += ("tb ae l", "df iu ")
_ORDERS = ((0, 0, 1, 1), (0, 1, 1, 0), (1, 0, 0, 1), (1, 1, 0, 0))
WORDS = tuple(
    family[c] + family[3 + v] + family[d] + family[3 + w] + family[6:]
    for family in _FAMILIES
    for c, v, d, w in _ORDERS
)
NAMES = {"speech": (1, 6), "spoken_words": (1, 1)}  # data.name -> words in an utterance
_SPEAKERS = {"train": range(400), "test": range(1000, 1100)}
_SEEDS = {"train": 0, "test": 2**40}  # test starts where no train set reaches

_STEP = 80  # samples between control points: 5 ms
_HOP = 160  # samples between frames, which are Hann windows of two hops
_FFT = 6 * _HOP  # with room for formants to ring: at 70 Hz of bandwidth down to -76 dB
_LONGEST, _SHORTEST = 3.8, 1.0  # seconds of speech, and of sound with the silence around it

# The first three formants in Hz, of a long vocal tract; for other sounds than vowels those towards
# which the neighbours bend (their loci).
_FORMANTS = {
    "a": (750, 1250, 2500), "e": (480, 1900, 2550), "i": (280, 2250, 2950), "o": (480, 850, 2450),
    "u": (310, 750, 2250), "m": (250, 1000, 2200), "n": (250, 1600, 2550), "l": (350, 1150, 2750),
    "s": (280, 1650, 2600), "z": (250, 1650, 2600), "f": (280, 1050, 2250),
    "p": (220, 800, 2150), "b": (200, 800, 2150), "t": (240, 1750, 2700), "d": (200, 1750, 2700),
    "k": (240, 1950, 2250),
}  # fmt: skip
# Centre and width in Hz of the noise at the constriction.
_FRICTION = {
    "s": (5800, 1100), "z": (5600, 1100), "f": (4500, 3500), "p": (900, 700), "b": (800, 600),
    "t": (4200, 1300), "d": (3800, 1300), "k": (1900, 450),
}  # fmt: skip
# Segments of (milliseconds, voice, breath, friction): a stop is silent, bursts and may breathe out.
_SEGMENTS = {
    **dict.fromkeys("aeiou", ((115, 1.0, 0.0, 0.0),)),
    **dict.fromkeys("mn", ((75, 0.45, 0.0, 0.0),)),
    "l": ((70, 0.6, 0.0, 0.0),),
    "s": ((105, 0.0, 0.0, 0.5),),
    "z": ((85, 0.3, 0.0, 0.25),),
    "f": ((95, 0.0, 0.0, 0.12),),
    **dict.fromkeys("ptk", ((65, 0.0, 0.0, 0.0), (10, 0.0, 0.0, 0.7), (35, 0.0, 0.35, 0.05))),
    **dict.fromkeys("bd", ((60, 0.15, 0.0, 0.0), (10, 0.3, 0.0, 0.5))),
}
# A control point: voice, breath, friction, three formants, centre and width of the noise.
_QUIET = (0, 0, 0, 500, 1500, 2500, 3000, 2000)


def spoken_table(config: Mapping[str, Any]) -> Table:
    """Utterances made from the index: `num_examples` in the split, `name` speech or spoken_words.

    speech has 1 to 6 words in an utterance, spoken_words one. Columns: audio (float32 [T] at
    16 kHz, 1 to 4 seconds), text (the words, in letters that stand for one sound each) and label,
    the first of the 40 words. Train and test have other words in a row and other speakers.

    With spoken_words the label asks for more than which sounds there are: four words each share
    their letters. A linear probe on the mean log-mel spectrum knows the four (94 %) but not the
    word (34 %), while one that sees eight parts of the word in order does (99 %); features that
    know their neighbours carry the order into their mean.

    Raises:
      UserError: another name, numbers that are not positive, a split other than train and test.
    """
    name, count = setting(config, "name", "speech"), setting(config, "num_examples", 0)
    if name not in NAMES:
        refuse_name("data.name: the synthetic set", name, NAMES)
    sizes = {"train": count or 4096, "test": count or 256}
    if min(sizes.values()) < 1:
        raise UserError(f"data.num_examples={count} must be positive; correct it")
    ranges = split_ranges(setting(config, "split", "train"), sizes, f"synthetic {name}")
    seeds = np.concatenate([np.arange(r.start, r.stop) + _SEEDS[split] for split, r in ranges])
    columns = {"audio": Column("audio"), "text": Column("text"), "label": Column("label", WORDS)}
    return Table(f"synthetic {name}", columns, lambda wanted: SpokenRows(seeds, name))


@dataclasses.dataclass(frozen=True)
class SpokenRows:
    """An utterance for each seed, rendered when asked for."""

    seeds: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict[str, Any]:
        seed = int(self.seeds[index])
        rng = np.random.default_rng([seed, *self.name.encode()])
        least, most = NAMES[self.name]
        chosen = rng.integers(0, len(WORDS), rng.integers(least, most + 1))
        speakers = _SPEAKERS["test" if seed >= _SEEDS["test"] else "train"]
        words = [WORDS[number] for number in chosen]
        audio = render(words, Speaker.of(int(rng.choice(speakers))), rng)
        return {"audio": audio, "text": " ".join(words), "label": int(chosen[0])}


@dataclasses.dataclass(frozen=True)
class Speaker:
    """How somebody speaks.

    pitch: Hz of the voice, around which it moves.
    tract: factor on all formants; 1 is a long vocal tract.
    tempo: factor on all durations.
    breath: noise in the voice, as a share of it.
    tilt: exponent of the frequency by which the voice and the microphone favour high tones.
    """

    pitch: float
    tract: float
    tempo: float
    breath: float
    tilt: float

    @classmethod
    def of(cls, number: int) -> "Speaker":
        """The speaker of this number; higher voices tend to have shorter tracts."""
        u = np.random.default_rng([number, 1]).random(5)
        pitch = 90 * (260 / 90) ** u[0]
        tract = 0.95 + 0.17 * u[0] + 0.1 * u[1]
        return cls(pitch, tract, 0.85 + 0.35 * u[2], 0.02 + 0.15 * u[3] ** 2, 0.5 * u[4] - 0.25)


def render(words: Sequence[str], speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """What the speaker says, float32 [T] in [-1, 1] with 1 to 4 seconds at 16 kHz."""
    track = _track(words, speaker, rng)
    size = len(track) * _STEP
    # Linear between control points, so that a burst still starts within 5 ms.
    positions = np.arange(size, dtype=np.float32) / _STEP
    voice, breath, friction = (
        np.interp(positions, np.arange(len(track)), track[:, column]).astype(np.float32)
        for column in (0, 1, 2)
    )
    pulses, opened = _glottis(size, speaker, rng)
    noise = rng.standard_normal((3, size), dtype=np.float32)
    voiced = voice * (pulses + speaker.breath * opened * noise[0]) + 0.3 * breath * noise[0]
    frames = np.concatenate([track[:: _HOP // _STEP], track[-1:]])  # one at either end
    spectrum = _frames(voiced) * _formants(frames[:, 3:6], speaker)
    spectrum += _frames(friction * noise[1]) * _friction(frames[:, 6:8], speaker)
    speech = _join(spectrum * _tilt(speaker.tilt), size)
    # Somebody turns towards the microphone and away from it, in a room that is never quiet.
    cycles = np.linspace(0, 2 * np.pi * rng.uniform(0.2, 1), size, dtype=np.float32)
    speech *= np.exp(0.3 * np.sin(cycles + np.float32(rng.uniform(0, 2 * np.pi))))
    speech *= 10 ** rng.uniform(-1.7, -0.9) / (np.sqrt(np.mean(speech**2)) + 1e-9)
    speech += 10 ** rng.uniform(-3.5, -2.3) * noise[2]
    return np.clip(speech, -1, 1).astype(np.float32)


def _track(words: Sequence[str], speaker: Speaker, rng: np.random.Generator) -> np.ndarray:
    """Control points [n, 8] as _QUIET, one every _STEP samples."""
    rows, lengths = [], []
    for number, word in enumerate(words):
        if number and rng.random() < 0.7:
            rows.append(_QUIET)
            lengths.append(rng.uniform(30, 160))
        for letter in word:
            strength = rng.uniform(0.8, 1.2)
            bend = rng.normal(1, 0.03, 3) * _FORMANTS[letter]
            tempo = speaker.tempo * rng.uniform(0.85, 1.15)
            for duration, *levels in _SEGMENTS[letter]:
                noise = _FRICTION.get(letter, _QUIET[6:])
                rows.append((*(strength * np.array(levels)), *bend, *noise))
                lengths.append(duration * tempo)
    milliseconds = np.array(lengths) * min(1, 1000 * _LONGEST / sum(lengths))
    # Quiet before and behind; what a sound is too short by is shared out between them.
    edges = rng.uniform(30, 100, 2)
    missing = max(0, 1000 * _SHORTEST - milliseconds.sum() - edges.sum())
    before, behind = edges + missing * np.array([share := rng.random(), 1 - share])
    lengths = np.concatenate([[before], milliseconds, [behind]]) * (RATE / 1000 / _STEP)
    counts = np.diff(np.rint(np.cumsum(lengths)).astype(int), prepend=0)
    counts[-1] += -counts.sum() % (_HOP // _STEP)
    track = np.repeat(np.array([_QUIET, *rows, _QUIET], np.float32), counts, axis=0)
    # Coarticulation: formants glide over 30 ms. The voice swells, a burst stays sharp.
    track[:, :1] = _smooth(track[:, :1], 5)
    track[:, 3:6] = _smooth(_smooth(track[:, 3:6], 5), 3)
    return track


def _smooth(columns: np.ndarray, width: int) -> np.ndarray:
    """Means over `width` (odd) rows around each row."""
    padded = np.pad(columns, ((width // 2, width // 2), (0, 0)), "edge")
    return sliding_window_view(padded, width, axis=0).mean(axis=-1)


def _glottis(
    size: int, speaker: Speaker, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The glottal pulses [size], and how far the glottis is open [size]."""
    time = np.arange(size) / RATE
    rate, start = rng.uniform(2, 4), rng.uniform(0, 2 * np.pi)
    melody = 1.08 - 0.05 * time + 0.06 * np.sin(2 * np.pi * rate * time / 2 + start)
    cycle = np.cumsum(speaker.pitch * melody) / RATE
    # Each period has its own length and strength: jitter and shimmer.
    period = cycle.astype(int)
    uneven = rng.normal(size=(2, period[-1] + 1)) * [[0.015], [0.06]] + 1
    cycle = np.cumsum(speaker.pitch * melody * uneven[0, period]) / RATE
    period, phase = cycle.astype(int), (cycle % 1).astype(np.float32)
    strength = uneven[1, np.minimum(period, len(uneven[1]) - 1)].astype(np.float32)
    # The derivative of the flow, as KLGLOTT88 (Klatt and Klatt 1990): it grows, turns and stops.
    share = np.float32(0.6)
    pulse = np.where(phase < share, phase * (2 - 3 * phase / share), 0) * strength
    return 2 * pulse, (phase < share).astype(np.float32)


def _frames(sound: np.ndarray) -> np.ndarray:
    """Spectra [T / _HOP + 1, _FFT / 2 + 1] of frames around every hop."""
    window = np.hanning(2 * _HOP + 1)[:-1].astype(np.float32)
    frames = sliding_window_view(np.pad(sound, _HOP), 2 * _HOP)[::_HOP] * window
    return np.fft.rfft(frames, _FFT)


def _join(spectrum: np.ndarray, size: int) -> np.ndarray:
    """The sound [size] of spectra, by adding their overlapping frames."""
    parts = np.fft.irfft(spectrum, _FFT).reshape(len(spectrum), -1, _HOP)
    sound = np.zeros((len(spectrum) + parts.shape[1], _HOP), np.float32)
    for late in range(parts.shape[1]):
        sound[late : late + len(parts)] += parts[:, late]
    return sound.reshape(-1)[_HOP : _HOP + size]


@functools.lru_cache
def _frequencies() -> np.ndarray:
    return np.fft.rfftfreq(_FFT, 1 / RATE).astype(np.float32)


def _formants(formants: np.ndarray, speaker: Speaker) -> np.ndarray:
    """The response of five resonators [F, _FFT / 2 + 1] whose first three move, [F, 3] in Hz."""
    turn = np.exp(-2j * np.pi * _frequencies() / RATE).astype(np.complex64)
    high = np.broadcast_to(np.float32([3500, 4500]), (len(formants), 2))
    centres = np.concatenate([formants, high], axis=1) * np.float32(speaker.tract)
    response = np.ones((), np.complex64)
    for centre, width in zip(centres.T, (70, 90, 140, 250, 350), strict=True):
        radius = np.float32(np.exp(-np.pi * width / RATE))
        twice = (2 * radius * np.cos(2 * np.pi * centre / RATE)).astype(np.float32)[:, None]
        gain = 1 - twice + radius**2  # no change at 0 Hz
        response = response * (gain / (1 - twice * turn + radius**2 * turn**2))
    return response


def _friction(noise: np.ndarray, speaker: Speaker) -> np.ndarray:
    """The bands of friction [F, _FFT / 2 + 1] from centres and widths in Hz, [F, 2]."""
    centre, width = (noise * np.float32(speaker.tract)).T[:, :, None]
    return np.exp(-0.5 * ((_frequencies() - centre) / width) ** 2)


def _tilt(power: float) -> np.ndarray:
    return ((_frequencies() + 100) / 1000) ** np.float32(power)
