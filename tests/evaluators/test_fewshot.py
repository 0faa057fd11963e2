import jax.numpy as jnp
import numpy as np
import pytest

from bivl.evaluators import fewshot


@pytest.mark.parametrize("rows", [5, 12, 13, 30])
def test_both_forms_agree_with_the_closed_form(rows):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(rows, 12)), rng.normal(size=(rows, 3))
    # The same minimum as an ordinary least-squares fit with sqrt(strength) * I appended.
    stacked = np.concatenate([x, np.sqrt(7.0) * np.eye(12)])
    expected, *_ = np.linalg.lstsq(stacked, np.concatenate([y, np.zeros((12, 3))]), rcond=None)
    for form in ("primal", "dual", None):
        np.testing.assert_allclose(fewshot.ridge(x, y, 7.0, form), expected, atol=1e-10)


@pytest.mark.parametrize("width", [3, 200])  # the primal and the dual side of N >= D
def test_answers_match_the_protocol_written_out(blobs, width):
    shots, test = blobs(20, width, 4, spread=3.0), blobs(33, width, 4, seed=1, spread=3.0)
    mean, std = shots["x"].mean(axis=0), shots["x"].std(axis=0) + 1e-5
    inside = np.c_[(shots["x"] - mean) / std, np.full(20, 100.0)]
    outside = np.c_[(test["x"] - mean) / std, np.full(33, 100.0)]
    targets = np.where(shots["label"][:, None] == np.arange(4), 1.0, -1.0)
    weights = np.linalg.inv(inside.T @ inside + 1024 * np.eye(width + 1)) @ inside.T @ targets
    found = fewshot.classify(shots["x"], shots["label"], test["x"], 4)
    np.testing.assert_array_equal(found, np.argmax(outside @ weights, axis=1))
    assert len(np.unique(found)) == 4


def test_more_shots_contain_the_fewer_and_seeds_differ():
    labels = np.repeat(np.arange(3), 10)
    first, again, other = (fewshot.shuffled_classes(labels, 3, seed) for seed in (0, 0, 1))
    for number in range(3):
        assert np.all(labels[first[number]] == number)
        assert sorted(first[number]) == sorted(other[number])
        np.testing.assert_array_equal(first[number], again[number])
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_results_are_means_over_seeds_and_grow_with_shots(identity, splits_of, blobs):
    train, test = blobs(120, 16, 4, spread=2.0), blobs(80, 16, 4, seed=1, spread=2.0)
    config = {"shots": (1, 25), "seeds": 3}
    found = fewshot.make(identity, splits_of(train, test), config)(jnp.float32(1), None)
    assert set(found) == {"fewshot/accuracy_1", "fewshot/accuracy_25"}
    expected = []
    for seed in range(3):
        order = fewshot.shuffled_classes(train["label"], 4, seed)
        index = np.concatenate([members[:1] for members in order])
        answers = fewshot.classify(train["x"][index], train["label"][index], test["x"], 4)
        expected.append(np.mean(answers == test["label"]))
    assert found["fewshot/accuracy_1"] == pytest.approx(np.mean(expected))
    assert len(set(expected)) > 1
    assert found["fewshot/accuracy_25"] > found["fewshot/accuracy_1"]


def test_a_class_short_of_examples_gives_all_it_has(identity, splits_of, blobs):
    train, test = blobs(60, 8, 3), blobs(30, 8, 3, seed=1)
    keep = (train["label"] != 2) | (np.arange(60) < 6)  # class 2 keeps two examples
    train = {name: value[keep] for name, value in train.items()}
    order = fewshot.shuffled_classes(train["label"], 3, seed=0)
    index = np.concatenate([order[0][:10], order[1][:10], order[2]])
    assert len(index) == 22
    answers = fewshot.classify(train["x"][index], train["label"][index], test["x"], 3)
    run = fewshot.make(identity, splits_of(train, test), {"shots": 10, "seeds": 1})
    found = run(jnp.float32(1), None)["fewshot/accuracy_10"]
    assert found == pytest.approx(np.mean(answers == test["label"]))
