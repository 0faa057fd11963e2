"""Masks as configs ask for them, text and speech, against statistics recorded in plain Python."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sequences
from bivl.core import config as configs
from bivl.modalities import speech, text

RECORDED = json.loads((Path(__file__).parents[1] / "golden/sequence_masks.json").read_text())
SAMPLES = {99: 31_760, 250: 80_080, 499: 160_000}  # of sound, by the frames they make
TEXT, TEXT2 = "data2vec_text.py:size=base", "data2vec2_text.py:size={}"
SPEECH, SPEECH2 = "data2vec_speech.py:size=base", "data2vec2_speech.py:size={}"


@pytest.fixture(autouse=True)
def many_ids(monkeypatch):
    ids = sequences.Tokenizer(size=50265, mask=50264)
    monkeypatch.setattr(text.tokenizers, "load", lambda config: ids)


def load(spec, **changes):
    config = configs.load(f"configs/pretrain/{spec}")
    configs.override(config, [(k.replace("__", "."), str(v)) for k, v in changes.items()])
    return config


def measured(mask):
    """The quantities of record_sequence_masks.py, of one mask."""
    edges = np.diff(np.concatenate([[False], mask]).astype(int))
    found = {"hidden": mask.sum(), "runs": (edges == 1).sum()}
    ends = {"first": mask[0], "middle": mask[len(mask) // 2], "last": mask[-1]}
    return found | ends


def assert_recorded(name: str, lines: list[dict]) -> None:
    """Means within five standard errors of both draws, spreads alike."""
    entry, count = RECORDED[name], len(lines)
    for key in lines[0]:
        values = np.array([line[key] for line in lines], float)
        mean, std, low, high = entry[key]
        error = std * (1 / count + 1 / entry["draws"]) ** 0.5
        np.testing.assert_allclose(values.mean(), mean, rtol=1e-5, atol=5 * error, err_msg=key)
        if key not in ("first", "middle", "last"):
            few = 6 * (1 / count + 1 / entry["draws"]) ** 0.5
            np.testing.assert_allclose(values.std(), std, rtol=few, atol=1e-6, err_msg=key)
            assert low - 3 * std <= values.min() and values.max() <= high + 3 * std, key


@pytest.mark.parametrize("size", [512, 30])
def test_spans_of_text(size):
    """`mask` is what the loss scores; the input holds the mask token there and nowhere else."""
    sample, rng, ids = text.mask_sampler(load(TEXT)), np.random.default_rng(1), np.arange(4, 516)
    lines = []
    for _ in range(2000):
        drawn = sample(rng, ids[:size].astype(np.int32))
        assert not drawn["mask"][size:].any() and (drawn["inputs"][size:] == 1).all()
        wanted = np.where(drawn["mask"][:size], 50264, ids[:size])
        np.testing.assert_array_equal(drawn["inputs"][:size], wanted)
        lines.append(measured(drawn["mask"][:size]))
    assert_recorded(f"text_spans/{size}", lines)


@pytest.mark.parametrize("size", [512, 30])
@pytest.mark.parametrize("score", ["all", "masked"])
def test_masks_of_bert(size, score):
    """Kept and random tokens are the recorded shares; `masked` scores only mask tokens."""
    config = load(f"{TEXT},masks=bert", masking__score=score)
    sample, rng, ids = text.mask_sampler(config), np.random.default_rng(2), np.arange(4, 516)
    lines = []
    for _ in range(1000):
        drawn = sample(rng, ids[:size].astype(np.int32))
        mask, inputs = drawn["mask"][:size], drawn["inputs"][:size]
        replaced = (inputs != ids[:size]) & (inputs != 50264)
        counts = {"random": replaced.sum()}
        if score == "all":
            counts |= measured(mask) | {"kept": (mask & (inputs == ids[:size])).sum()}
            assert not (replaced & ~mask).any()
        else:
            np.testing.assert_array_equal(mask, inputs == 50264)
        assert not np.isin(inputs[replaced], [0, 1, 2, 3, 50264]).any()
        lines.append(counts)
    assert_recorded(f"bert/{size}", lines)


@pytest.mark.parametrize("frames", [499, 99])
def test_spans_of_frames(frames):
    config = load(SPEECH, audio__length=SAMPLES[frames])
    assert speech.grid(config) == (frames,)
    sample, rng = speech.mask_sampler(config), np.random.default_rng(3)
    lines = [measured(sample(rng, frames)["mask"]) for _ in range(2000)]
    assert_recorded(f"frame_spans/{frames}", lines)


@pytest.mark.parametrize("rows", [2, 64])
def test_equalised_spans_of_a_batch(rows):
    """Every row keeps as many frames as the fewest, some of its own, drawn afresh."""
    config = load(SPEECH, audio__length=SAMPLES[499], masking__equal=rows)
    sample, rng = speech.mask_sampler(config), np.random.default_rng(4)
    equalize, lines = jax.jit(speech.device_ops(config)), []
    for _ in range(100):
        drawn = [sample(rng, 499) for _ in range(rows)]
        batch = {key: np.stack([row[key] for row in drawn]) for key in drawn[0]}
        batch["length"] = np.full(rows, SAMPLES[499], np.int32)
        masks = np.asarray(equalize(batch)["mask"])
        assert set(masks.sum(1)) == {batch["mask"].sum(1).min()}
        assert not (masks & ~batch["mask"]).any()
        lines.append(measured(masks[0]))
    assert_recorded(f"frame_spans_batch/499x{rows}", lines)


def test_equalising_takes_frames_evenly():
    """Of 12 masked frames 4 stay, each as often as the others."""
    config = load(SPEECH, audio__length=SAMPLES[99])
    equalize = jax.jit(speech.device_ops(config))
    mask = np.zeros((2, 99), bool)
    mask[0, 40:52] = mask[1, :4] = True
    rng, total = np.random.default_rng(5), np.zeros(99)
    for _ in range(600):
        order = np.stack([rng.permutation(99) for _ in range(2)]).astype(np.int32)
        length = np.full(2, SAMPLES[99], np.int32)
        kept = np.asarray(equalize({"mask": mask, "order": order, "length": length})["mask"])
        np.testing.assert_array_equal(kept[1], mask[1])
        total += kept[0]
    assert total.sum() == 600 * 4
    np.testing.assert_allclose(total[40:52] / 600, 1 / 3, atol=5 * (2 / 9 / 600) ** 0.5)


def test_a_short_row_does_not_unmask_the_long_ones():
    """Shares are equal, not counts: 30 of 99 frames where the short row has 10 of 33."""
    config = load(SPEECH, audio__length=SAMPLES[99])
    mask, rng = np.zeros((2, 99), bool), np.random.default_rng(8)
    mask[0, 20:70] = mask[1, 5:15] = True
    order = np.stack([rng.permutation(99) for _ in range(2)]).astype(np.int32)
    length = np.array([SAMPLES[99], 33 * 320 + 80], np.int32)
    batch = {"mask": mask, "order": order, "length": length}
    assert list(speech.num_frames(config, length)) == [99, 33]
    assert list(speech.device_ops(config)(batch)["mask"].sum(1)) == [30, 10]


def test_rows_are_equal_among_those_that_stand_together():
    config = load(SPEECH, audio__length=SAMPLES[99], masking__equal=2)
    mask = np.arange(99) < np.array([[40], [30], [20], [50], [10]])
    order = np.tile(np.arange(99, dtype=np.int32), (5, 1))
    batch = {"mask": mask, "order": order, "length": np.full(5, SAMPLES[99], np.int32)}
    assert list(speech.device_ops(config)(batch)["mask"].sum(1)) == [30, 30, 20, 20, 10]


def test_clones_score_no_padding():
    """Frames of padding leave the masks of the loss, and nothing else does."""
    config = load(SPEECH2.format("base"), audio__length=SAMPLES[250])
    drawn = speech.mask_sampler(config)(np.random.default_rng(6), 250)
    batch = {"mask": drawn["mask"][None], "length": jnp.array([SAMPLES[99]], jnp.int32)}
    hidden = np.asarray(speech.device_ops(config)(batch)["mask"][0])
    np.testing.assert_array_equal(hidden[:, :99], drawn["mask"][:, :99])
    assert not hidden[:, 99:].any() and drawn["mask"][:, 99:].any()


CLONES = {  # recorded name: config, modality, changes
    "block_line/250": (SPEECH2.format("base"), speech, {"audio__length": SAMPLES[250]}),
    "block_line/499_large": (SPEECH2.format("large"), speech, {"audio__length": SAMPLES[499]}),
    "uniform/512_base": (TEXT2.format("base"), text, {}),
    "uniform/512_large": (TEXT2.format("large"), text, {}),
    "uniform/24": (TEXT2.format("base"), text, {"text__length": 24}),
}
INVERSE = {
    f"{name}_inverse": (spec, modality, changes | {"masking__inverse": True})
    for name, (spec, modality, changes) in CLONES.items()
    if "block" in name
}


@pytest.mark.parametrize("name", CLONES | INVERSE)
def test_masks_of_clones(name):
    spec, modality, changes = (CLONES | INVERSE)[name]
    config = load(spec, **changes)
    sample, rng = modality.mask_sampler(config), np.random.default_rng(7)
    lines = []
    for _ in range(2000 // config.masking.num_masks):
        drawn = sample(rng, np.zeros(24, np.int32))
        for mask, keep in zip(drawn["mask"], drawn["keep"], strict=True):
            np.testing.assert_array_equal(np.flatnonzero(~mask), keep)
            lines.append(measured(mask))
    assert_recorded(name, lines)
