import pickle

import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.data.spoken import WORDS, Speaker, render, spoken_table

VOICE = Speaker(pitch=120, tract=1.0, tempo=1.0, breath=0.02, tilt=0.0)


def rows(name="speech", **config):
    return spoken_table({"name": name, **config}).rows(("audio", "text", "label"))


def message(**config):
    with pytest.raises(UserError) as error:
        spoken_table(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def spectrum(sound):
    """Mean power [129] of frames of 256 samples, 62.5 Hz apart."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, 256)[::128] * np.hanning(256)
    return (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)


def loud(sound, share=0.5):
    """The samples around which a sound is loud."""
    power = np.convolve(sound**2, np.ones(320) / 320, "same")
    return sound[power > share * power.max()]


def test_words_have_the_same_letters_by_fours():
    assert len(WORDS) == len(set(WORDS)) == 40
    for i in range(0, 40, 4):
        assert len({tuple(sorted(word)) for word in WORDS[i : i + 4]}) == 1
    assert len({tuple(sorted(word)) for word in WORDS}) == 10
    assert set("".join(WORDS)) == set("abdefiklmnopstuz")


def test_utterances():
    utterances = rows(num_examples=30)
    counts = set()
    for i in range(len(utterances)):
        row = utterances[i]
        sound, words = row["audio"], row["text"].split(" ")
        assert sound.dtype == np.float32 and sound.ndim == 1
        assert 16000 <= len(sound) <= 4 * 16000
        assert np.isfinite(sound).all() and 0.01 < np.abs(sound).max() <= 1
        assert set(words) <= set(WORDS) and WORDS[row["label"]] == words[0]
        counts.add(len(words))
    assert counts == {1, 2, 3, 4, 5, 6}


def test_single_words():
    utterances = rows("spoken_words", num_examples=200)
    found = [utterances[i] for i in range(200)]
    assert all(WORDS[row["label"]] == row["text"] for row in found)
    assert len({row["label"] for row in found}) > 35


def test_a_number_is_an_utterance():
    first, again = rows(num_examples=9), pickle.loads(pickle.dumps(rows(num_examples=5)))
    np.testing.assert_array_equal(first[3]["audio"], again[3]["audio"])
    part = rows(num_examples=9, split="train[3:5]")
    assert len(part) == 2 and np.array_equal(part[0]["audio"], first[3]["audio"])
    assert not np.array_equal(first[3]["audio"][:9000], first[4]["audio"][:9000])


def test_splits_differ():
    train, test = rows(num_examples=20), rows(num_examples=20, split="test")
    assert len({train[i]["text"] for i in range(20)} & {test[i]["text"] for i in range(20)}) < 5
    both = rows(num_examples=3, split="train+test")
    assert len(both) == 6 and both[3]["text"] == test[0]["text"]
    assert len(rows(split="test")) == 256


def test_errors():
    assert "did you mean 'speech'" in message(name="speach")
    assert "num_examples=-1" in message(num_examples=-1)
    assert "data.split" in message(split="dev")


def test_vowels_have_their_formants():
    for vowel, first, second in (("a", 750, 1250), ("i", 280, 2250), ("u", 310, 750)):
        sound = render([vowel * 8], VOICE, np.random.default_rng(0))
        power = spectrum(loud(sound))
        hertz = np.arange(129) * 62.5
        near = [power[abs(hertz - f) < 150].max() for f in (first, second)]
        between = power[(hertz > first + 300) & (hertz < second - 300)]
        above = power[(hertz > second + 500) & (hertz < 2000)]
        assert max(near[0], near[1]) == power.max()
        for quiet in (between, above):
            assert not quiet.size or min(near) > 2 * quiet.min()


@pytest.mark.parametrize("pitch", [100, 250])
def test_voice_has_its_pitch(pitch):
    speaker = Speaker(pitch=pitch, tract=1.0, tempo=1.0, breath=0.02, tilt=0.0)
    sound = loud(render(["aaaaaa"], speaker, np.random.default_rng(1)))[2000:6000]
    alike = np.correlate(sound, sound, "full")[len(sound) - 1 :]
    lags = np.arange(16000 // 300, 16000 // 80)
    found = 16000 / lags[alike[lags].argmax()]
    assert 0.85 * pitch < found < 1.2 * pitch


def test_friction_and_voice_lie_in_other_bands():
    hiss, hum = (spectrum(loud(render([w], VOICE, np.random.default_rng(2)))) for w in ("ss", "mm"))
    assert hiss[64:].sum() > 10 * hiss[:48].sum()  # above 4 kHz, below 3 kHz
    assert hum[:8].sum() > 10 * hum[32:].sum()  # below 500 Hz, above 2 kHz


def test_stops_are_silent_before_they_burst():
    sound = render(["aka"], VOICE, np.random.default_rng(3))
    level = np.sqrt(np.convolve(sound**2, np.ones(160) / 160, "valid"))[::80]
    first, last = np.flatnonzero(level > 0.5 * level.max())[[0, -1]]
    assert level[first:last].min() < 0.1 * level.max()
    sung = render(["ala"], VOICE, np.random.default_rng(3))
    level = np.sqrt(np.convolve(sung**2, np.ones(160) / 160, "valid"))[::80]
    first, last = np.flatnonzero(level > 0.5 * level.max())[[0, -1]]
    assert level[first:last].min() > 0.1 * level.max()


def test_speakers():
    people = [Speaker.of(number) for number in range(50)]
    assert people[7] == Speaker.of(7) and len(set(people)) == 50
    assert all(90 <= person.pitch <= 260 and 0.9 < person.tract < 1.25 for person in people)
    assert max(p.pitch for p in people) > 1.8 * min(p.pitch for p in people)
