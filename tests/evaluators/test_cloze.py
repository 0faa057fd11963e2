import types

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from bivl.core.errors import GuardStop, UserError
from bivl.evaluators import cloze

pytestmark = pytest.mark.usefixtures("quick_compile")
WIDTH = 5


@pytest.fixture
def masked():
    """predict: the features are `x`, scaled by params."""
    return {"masked": lambda params, extras, batch: batch["x"] * params}


def draw(count, vocabulary=8, signal=2.0, length=12, seed=0):
    """Batches of 4 texts whose features hint at their tokens; `count` batches."""
    rng = np.random.default_rng(seed)
    hints = np.random.default_rng(99).normal(size=(vocabulary, WIDTH))
    for _ in range(count):
        shape = 4, length
        tokens = rng.choice(vocabulary, size=shape, p=_zipf(vocabulary)).astype(np.int32)
        x = signal * hints[tokens] + rng.normal(size=(*shape, WIDTH))
        mask = rng.random(shape) < 0.4
        x[~mask] = 1e6  # must not be read
        yield {"tokens": jnp.asarray(tokens), "mask": jnp.asarray(mask), "x": jnp.float32(x)}


def _zipf(vocabulary):
    weight = 1 / np.arange(1, vocabulary + 1)
    return weight / weight.sum()


def splits(train=12, test=6, asked=None, **settings):
    def batches(split):
        if asked is not None:
            asked.append(split)
        return draw(train if split == "train" else test, seed=len(split), **settings)

    return types.SimpleNamespace(masked=batches, classes=None)


def gather(count, seed, **settings):
    """(features [N, E], tokens [N]) of the masked positions."""
    parts = list(draw(count, seed=seed, **settings))
    mask = np.concatenate([b["mask"] for b in parts])
    x, tokens = (np.concatenate([b[name] for b in parts])[mask] for name in ("x", "tokens"))
    return x, tokens


def test_unigram_floor_by_hand(masked):
    run = cloze.make(masked, splits(), {"l2": (1.0,), "vocabulary": 10})
    found = run(jnp.float32(1), None)
    known, asked = gather(12, 5)[1], gather(6, 4)[1]
    counts = np.array([(known == token).sum() + 1 for token in range(10)])
    log_prior = np.log(counts / (len(known) + 10))
    assert found["cloze/unigram_loss"] == pytest.approx(-log_prior[asked].mean(), abs=1e-5)
    assert found["cloze/unigram_accuracy"] == pytest.approx(np.mean(asked == counts.argmax()))


def test_features_that_hint_beat_the_floor_and_noise_does_not(masked):
    found = cloze.make(masked, splits(40), {})(jnp.float32(1), None)
    assert found["cloze/loss"] < found["cloze/unigram_loss"] - 0.5
    assert found["cloze/accuracy"] > found["cloze/unigram_accuracy"] + 0.2
    noise = cloze.make(masked, splits(40, signal=0.0), {"l2": (100.0, 1e-4)})
    noise = noise(jnp.float32(1), None)
    assert noise["cloze/l2"] == 100.0
    assert noise["cloze/loss"] == pytest.approx(noise["cloze/unigram_loss"], abs=0.01)


def test_the_fit_is_that_of_the_whole_vocabulary():
    """Against scipy's minimiser over all columns, unseen tokens one by one."""
    rng, vocabulary, l2 = np.random.default_rng(0), 7, 0.02
    tokens = rng.choice([0, 2, 5], size=40, p=[0.5, 0.3, 0.2])
    x = (rng.normal(size=(40, 3)) + tokens[:, None] / 3).astype(np.float32)
    prior = np.log((np.bincount(tokens, minlength=vocabulary) + 1) / (40 + vocabulary))
    inputs = np.c_[x, np.ones(40)]

    def losses(weights, inputs, tokens):
        logits = inputs @ weights.reshape(4, vocabulary) + prior
        return np.log(np.exp(logits).sum(axis=1)) - logits[range(len(tokens)), tokens]

    def objective(weights):
        return losses(weights, inputs, tokens).mean() + l2 / 2 * np.sum(weights**2)

    best = optimize.minimize(objective, np.zeros(4 * vocabulary), tol=1e-10).x
    classes = cloze.Classes.of(tokens, vocabulary)
    assert classes.sizes.tolist() == [1, 1, 1, 4]
    weights = cloze.fit(x, tokens, classes, l2, classes.start(3), 200, 1e-6)
    np.testing.assert_allclose(weights, best.reshape(4, vocabulary)[:, [0, 2, 5, 1]], atol=2e-3)
    asked = np.array([0, 1, 5, 6])  # seen and unseen
    loss, _ = cloze.score(weights, x[:4], asked, classes)
    assert loss == pytest.approx(losses(best, inputs[:4], asked).mean(), abs=1e-4)


def test_probabilities_of_all_tokens_sum_to_one_in_any_chunks(monkeypatch):
    x, tokens = gather(6, 0)
    classes = cloze.Classes.of(tokens[:9], 20)
    whole = cloze.fit(x, tokens, classes, 0.1, classes.start(WIDTH))
    one = np.repeat(x[:1], 20, axis=0)
    each = [cloze.score(whole, one[:1], np.array([token]), classes)[0] for token in range(20)]
    assert np.exp(-np.array(each)).sum() == pytest.approx(1.0, abs=1e-5)
    expected = cloze.score(whole, x, tokens, classes)
    monkeypatch.setattr(cloze, "CELLS", 7 * len(classes.sizes))  # chunks of 7 rows
    assert cloze.score(whole, x, tokens, classes) == pytest.approx(expected)
    parts = cloze.fit(x, tokens, classes, 0.1, classes.start(WIDTH))
    np.testing.assert_allclose(parts, whole, atol=1e-3)


def test_unseen_tokens_are_never_right():
    classes = cloze.Classes.of(np.array([1, 1, 2]), 50)  # 48 unseen tokens hold most of the mass
    weights = classes.start(1)
    _, accuracy = cloze.score(weights, np.zeros((3, 1)), np.array([7, 1, 2]), classes)
    assert accuracy == pytest.approx(1 / 3)  # token 1, the most frequent


def test_positions_are_bounded_and_batches_read_only_as_needed(masked):
    asked = []
    one = splits(100, asked=asked)
    x, tokens = cloze.masked_positions(masked, one, "train", 33, 30, jnp.float32(1), None)
    assert asked == ["train"]
    expected = gather(100, 5)
    np.testing.assert_allclose(x, expected[0][:30], atol=1e-6)
    np.testing.assert_array_equal(tokens, expected[1][:30])
    assert x.dtype == np.float32
    read = []
    one.masked = lambda split: (read.append(0) or batch for batch in draw(100))
    cloze.masked_positions(masked, one, "train", 33, 30, jnp.float32(1), None)
    assert len(read) < 4
    cloze.masked_positions(masked, one, "train", 2, 10**9, jnp.float32(1), None)
    assert len(read) < 8
    x, _ = cloze.masked_positions(masked, one, "train", 33, 10**9, jnp.float32(1), None)
    assert len(x) > 500


def test_no_setting_passes_the_bound(masked, monkeypatch):
    monkeypatch.setattr(cloze, "MOST", 70)
    monkeypatch.setattr(
        cloze, "probe", lambda train, test, *_: {"sizes": (len(train[1]), len(test[1]))}
    )
    assert cloze.make(masked, splits(), {"positions": 10**6})(1.0, None) == {"sizes": (70, 70)}
    assert cloze.make(masked, splits(), {"positions": 9})(1.0, None) == {"sizes": (9, 9)}


def test_what_cannot_be_probed_is_refused(masked):
    def run(predict, one, scale=1.0, **settings):
        return cloze.make(predict, one, settings)(jnp.float32(scale), None)

    with pytest.raises(UserError, match="no 'masked' features of text; take cloze out of"):
        run({}, splits())
    with pytest.raises(UserError, match="no 'masked' features of text; take cloze out of"):
        run(masked, types.SimpleNamespace(classes=None))
    masks = [{"image": np.zeros((2, 8, 8, 3)), "mask": np.ones((2, 4), bool)}]
    with pytest.raises(UserError, match="no 'masked' features of text; take cloze out of"):
        run(masked, types.SimpleNamespace(masked=lambda split: iter(masks)))
    with pytest.raises(UserError, match="eval_data.test has no masked tokens"):
        run(masked, splits(test=0))
    with pytest.raises(UserError, match="needs 5 masked tokens of eval_data.train and found 3"):
        run(masked, splits(), positions=3)
    with pytest.raises(UserError, match="vocabulary=3 but token . occurs; raise it"):
        run(masked, splits(), vocabulary=3)
    with pytest.raises(GuardStop, match="not finite"):
        run(masked, splits(), scale=np.nan)
    with pytest.raises(UserError, match="config.eval.cloze has no key 'k'; it takes"):
        cloze.make(masked, splits(), {"k": 1})
