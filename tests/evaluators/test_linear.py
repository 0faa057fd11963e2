import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from bivl.core.errors import UserError
from bivl.evaluators import linear


def digits():
    x, label = load_digits(return_X_y=True)
    return {"x": x[:1200].astype(np.float32), "label": label[:1200]}, {
        "x": x[1200:].astype(np.float32),
        "label": label[1200:],
    }


def standardised(train, test):
    mean, std = train["x"].mean(axis=0), train["x"].std(axis=0) + 1e-5
    return (train["x"] - mean) / std, (test["x"] - mean) / std


def test_accuracy_within_one_percent_of_scikit_learn(identity, splits_of):
    train, test = digits()
    run = linear.make(identity, splits_of(train, test, batch_size=256), {})
    found = run(jnp.float32(1), None)
    inside, outside = standardised(train, test)
    strength = 1 / (found["linear/l2"] * len(inside))
    model = LogisticRegression(C=strength, max_iter=1000).fit(inside, train["label"])
    expected = model.score(outside, test["label"])
    assert expected > 0.9
    assert abs(found["linear/accuracy"] - expected) < 0.01


def test_fit_reaches_scikit_learns_minimum(blobs):
    data = blobs(90, 6, 3, spread=1.5)
    start = {"kernel": jnp.zeros((6, 3)), "bias": jnp.zeros(3)}
    rows = linear._chunks(data["x"], data["label"], 3)
    weights, _ = linear.fit(rows, np.ones(90), 0.01, start, tolerance=1e-6)
    model = LogisticRegression(C=1 / 0.9, tol=1e-8, max_iter=1000).fit(data["x"], data["label"])
    np.testing.assert_allclose(weights["kernel"], model.coef_.T, atol=2e-3)
    expected = model.predict_proba(data["x"])
    logits = data["x"] @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_chunks_and_left_out_rows_do_not_change_the_fit(blobs, monkeypatch):
    start = {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)}
    for count in (31, 32, 33):  # 2, 2 and 3 chunks; always 24 rows that count: 3 shapes to compile
        data = blobs(count, 4, 3)
        counted = np.ones(count, np.float32)
        counted[np.arange(count - 24) * 3] = 0
        alone = {name: value[counted > 0] for name, value in data.items()}
        rows = linear._chunks(alone["x"], alone["label"], 3)
        expected, _ = linear.fit(rows, np.ones(24), 0.1, start)
        with monkeypatch.context() as patch:
            patch.setattr(linear, "CELLS", 3 * 16)  # chunks of 16 rows
            rows = linear._chunks(data["x"], data["label"], 3)
        assert rows[0].shape == (-(-count // 16), 16, 4)
        found, _ = linear.fit(rows, counted, 0.1, start)
        np.testing.assert_allclose(found["kernel"], expected["kernel"], atol=1e-3)


def test_search_prefers_strong_l2_for_noise_and_weak_for_signal(identity, splits_of, blobs):
    config = {"l2": (1e-6, 1.0)}
    noisy = blobs(300, 50, 3, spread=5.0)
    clear = blobs(300, 50, 3, spread=0.3)  # the same shape: one compile
    clear["x"][:, 1:] *= np.float32(1e3)  # standardising makes scale irrelevant
    strong = linear.make(identity, splits_of(noisy, noisy), config)(jnp.float32(1), None)
    weak = linear.make(identity, splits_of(clear, clear), config)(jnp.float32(1), None)
    assert strong["linear/l2"] == 1.0
    assert weak["linear/l2"] == 1e-6
    assert weak["linear/accuracy"] == 1.0


def test_held_out_is_a_fifth_of_each_class():
    labels = np.repeat(np.arange(4), 25)
    held = linear.held_out(labels)
    assert [int(held[labels == number].sum()) for number in range(4)] == [5, 5, 5, 5]
    assert np.array_equal(held, linear.held_out(labels))  # the same in every run and process


def test_too_few_examples_are_refused(identity, splits_of, blobs):
    data = blobs(4, 3, 2)
    with pytest.raises(UserError, match="only 4 examples; give it 5 or more"):
        linear.make(identity, splits_of(data, data), {})(jnp.float32(1), None)
