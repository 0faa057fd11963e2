"""Speech recognition: the loss against all alignments, masks, freezing, what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bivl.core import config as configs
from bivl.core.errors import Undecodable, UserError
from bivl.data.decoding import Letters
from bivl.objectives import ctc

SMALL = {
    "model.width": "32",
    "model.depth": "1",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "model.extractor.width": "16",
    "model.extractor.kernels": "20,8",  # 320 samples a frame too, but two layers to compile
    "model.extractor.strides": "20,16",
    "model.position_conv.depth": "1",
    "batch_size": "2",
    "audio.length": "4000",
    "audio.eval_length": "6000",
    "max_letters": "6",
}
ABC = Letters("ABC")

pytestmark = pytest.mark.usefixtures("quick_compile")


def load(version="1", **changes):
    """A small config; `__` in `changes` stands for dots."""
    config = configs.load(f"configs/finetune/ctc.py:smoke,version={version}")
    changes = {name.replace("__", "."): str(value) for name, value in changes.items()}
    configs.override(config, list((SMALL | changes).items()))
    return config


def collapsed(path):
    """Repeats merged, then blanks left out."""
    return tuple(label for label, _ in itertools.groupby(path) if label)


def brute_force(log_probs, frames, transcript):
    """-log of the summed probabilities of every path of `frames` labels that spells it."""
    labels = range(log_probs.shape[1])
    paths = itertools.product(labels, repeat=frames)
    scores = [
        sum(log_probs[t, label] for t, label in enumerate(path))
        for path in paths
        if collapsed(path) == transcript
    ]
    return -np.logaddexp.reduce(scores) if scores else None


CASES = [  # valid frames, transcript
    (5, (1, 2)),
    (5, (1, 1, 2)),
    (4, (2, 2)),
    (3, (1, 2, 1)),
    (5, (1,)),
    (5, ()),
    (2, (1, 2, 1)),  # fewer frames than letters
    (3, (2, 2, 1)),  # no frame for the blank between
]


@functools.cache
def case():
    """(log_probs [N, 5, 3], padding, transcripts [N, 4]) of CASES; nonsense behind the ends."""
    rng = np.random.default_rng(0)
    log_probs = jax.nn.log_softmax(jnp.asarray(2 * rng.normal(size=(len(CASES), 5, 3))))
    frames = np.array([n for n, _ in CASES])
    transcripts = np.zeros((len(CASES), 4), np.int32)
    for row, (_, transcript) in zip(transcripts, CASES, strict=True):
        row[: len(transcript)] = transcript
    return log_probs, jnp.arange(5) >= frames[:, None], jnp.asarray(transcripts)


def test_loss_is_that_of_all_alignments():
    log_probs, padding, transcripts = case()
    found = ctc.ctc_loss(log_probs, padding, transcripts)
    possible = ctc.alignable(padding, transcripts)
    for i, (frames, transcript) in enumerate(CASES):
        expected = brute_force(np.asarray(log_probs[i], np.float64), frames, transcript)
        assert possible[i] == (expected is not None)
        assert float(found[i]) == pytest.approx(expected or 0.0, rel=1e-4)
    assert possible.tolist() == [True] * 6 + [False] * 2


def test_what_cannot_be_aligned_has_no_gradient():
    _, padding, transcripts = case()
    logits = jax.random.normal(jax.random.key(0), (len(CASES), 5, 3))

    def total(logits):
        return ctc.ctc_loss(jax.nn.log_softmax(logits), padding, transcripts).sum()

    gradient = jax.grad(total)(logits)
    assert jnp.isfinite(gradient).all()
    assert (gradient[-2:] == 0).all() and (jnp.abs(gradient[:-2]).max((1, 2)) > 1e-3).all()
    assert (gradient[2, 4:] == 0).all()  # behind the end of an utterance


def sound(samples, seed=0):
    return np.random.default_rng(seed).normal(size=samples).astype(np.float32)


@pytest.fixture(scope="module")
def made():
    """(config, objective) with other letters than LibriSpeech's."""
    config = load(letters="ABC", mask_ratio=0.5, channels__ratio=0.4, channels__span=4)
    return config, ctc.make(config)


def test_examples(made):
    config, objective = made
    assert config.eval.wer.letters == "ABC"
    record = {"audio": sound(2000), "text": "ab  c", "id": 3}
    example = objective.train_ops(record, np.random.default_rng(0))
    shapes = {name: s.shape[1:] for name, s in objective.spec.items()}
    assert {name: np.shape(value) for name, value in example.items()} == shapes
    assert example["transcript"].tolist() == [*ABC.encode("AB C"), 0, 0]
    frames = 6
    assert example["length"] == 2000 and example["mask"][:frames].any()
    assert not example["mask"][frames:].any()
    assert 0 < example["channels"].sum() < 32
    shown = objective.eval_ops(record)
    assert shown["audio"].shape == (6000,) and shown["id"] == 3
    assert set(shown) == {"audio", "length", "transcript", "id"}


def test_channels_are_left_alone_at_ratio_0():
    ops = ctc.make(load(channels__ratio=0)).train_ops
    record = {"audio": sound(2000), "text": "a"}
    assert not any(ops(record, np.random.default_rng(i))["channels"].any() for i in range(5))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"audio": sound(4001), "text": "a"}, "4001 samples .* config.audio.length=4000"),
        ({"audio": sound(900), "text": "abcabca"}, "7 letters .* config.max_letters=6"),
    ],
)
def test_too_long_for_training_is_replaced(made, record, words):
    with pytest.raises(Undecodable, match=words):
        made[1].train_ops(record, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"audio": sound(6001), "text": "a", "id": 5},
            "record 5: .* config.audio.eval_length=6000",
        ),
        ({"audio": sound(900), "text": "abcabca"}, "config.max_letters=6; raise these"),
        ({"audio": b"nothing", "text": "a", "id": 2}, "record 2: .* no WAV"),
        ({"audio": sound(900)}, "the data has no text; set config.data.fields.text"),
        ({"text": "a"}, "the data has no audio; set config.data.fields.audio"),
        ({"audio": sound(900), "text": "a dog"}, "a transcript holds 'D'"),
    ],
)
def test_no_score_leaves_out_a_record(made, record, words):
    with pytest.raises(UserError, match=words) as error:
        made[1].eval_ops(record)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modality": "text"}, "config.modality='text' has no frames"),
        ({"masking__kind": "random"}, "config.masking.kind='random' is unknown"),
        ({"max_letters": 0}, "config.max_letters=0"),
        ({"ctc_dropout": 1}, "config.ctc_dropout=1"),
        ({"channels__ratio": 1.5}, "config.channels.ratio=1.5"),
        ({"channels__span": 0}, "config.channels.span=0"),
        ({"letters": "AAB"}, "config.letters='AAB' must hold each letter once"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(UserError, match=words):
        ctc.make(load(**changes))


def batch_of(objective, seeds=(0, 1)):
    """A batch of two utterances of other lengths."""
    examples = [
        objective.train_ops({"audio": sound(4000 - 900 * i, seed), "text": "ab"}, rng)
        for i, (seed, rng) in enumerate((s, np.random.default_rng(i)) for i, s in enumerate(seeds))
    ]
    return {name: jnp.stack([e[name] for e in examples]) for name in examples[0]}


@functools.cache
def trained(version):
    """(objective, params) with a frozen extractor."""
    objective = ctc.make(load(version, model__freeze_extractor=True, mask_ratio=0.4))
    return objective, nn.unbox(jax.jit(objective.init)(jax.random.key(0))[0])


def test_the_extractor_learns_nothing_where_frozen():
    objective, params = trained("1")
    step = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, aux), grads = step(params, {}, batch_of(objective), {}, jax.random.key(1))
    assert np.isfinite(loss) and aux["metrics"]["alignable"] == 1
    for x in jax.tree.leaves(grads["embed"].pop("extractor")):
        assert (x == 0).all()
    moving = jax.tree_util.tree_flatten_with_path(grads)[0]
    still = [jax.tree_util.keystr(path) for path, x in moving if not (x != 0).any()]
    assert not still


def test_only_data2vec_1_has_learned_a_masked_frame():
    assert "fill" in trained("1")[1]["embed"] and "fill" not in trained("2")[1]["embed"]


def test_hidden_channels_say_nothing():
    objective, params = trained("2")
    run = jax.jit(lambda batch: objective.loss(params, {}, batch, {}, jax.random.key(1))[0])
    one, other = batch_of(objective), batch_of(objective, (5, 6))
    assert float(run(one)) != float(run(other))
    everything = {"channels": jnp.ones_like(one["channels"])}
    assert float(run(one | everything)) == float(run(other | everything))


def test_frames_of_the_log_probabilities():
    objective, params = trained("1")
    shown = [objective.eval_ops({"audio": sound(n), "text": "ab"}) for n in (2000, 6000)]
    batch = {name: jnp.stack([e[name] for e in shown]) for name in shown[0]}
    found, frames = objective.predict["log_probs"](params, {}, batch)
    assert frames.tolist() == [6, 19] and found.shape == (2, 19, 29)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
