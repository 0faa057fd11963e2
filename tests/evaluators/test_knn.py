import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.evaluators import knn


def by_hand(train, labels, test, num_classes, k, temperature):
    """The protocol one neighbour at a time, in float64."""
    answers = []
    for query in test.astype(np.float64):
        cosines = [
            row @ query / (np.linalg.norm(row) * np.linalg.norm(query))
            for row in train.astype(np.float64)
        ]
        votes = [0.0] * num_classes
        for index in sorted(range(len(train)), key=lambda i: -cosines[i])[:k]:
            votes[labels[index]] += np.exp(cosines[index] / temperature)
        answers.append(votes.index(max(votes)))
    return np.array(answers)


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_matches_by_hand(blobs, k, temperature):
    train, test = blobs(60, 5, 4, spread=2.0), blobs(41, 5, 4, seed=1, spread=2.0)
    expected = by_hand(train["x"], train["label"], test["x"], 4, k, temperature)
    found = knn.classify(train["x"], train["label"], test["x"], 4, (k,), temperature)[k]
    np.testing.assert_array_equal(found, expected)
    assert 0.3 < np.mean(found == test["label"]) < 1.0  # neither trivial nor hopeless


def test_one_close_neighbour_outweighs_two_far_ones():
    train = np.array([[1.0, 0.0], [0.5, 1.0], [0.4, 1.0]], np.float32)
    labels = np.array([0, 1, 1])
    query = np.array([[1.0, 0.1]], np.float32)
    assert knn.classify(train, labels, query, 2, (3,), 0.07)[3] == [0]
    assert knn.classify(train, labels, query, 2, (3,), 100.0)[3] == [1]  # a plain majority


def test_several_k_equal_one_at_a_time(blobs):
    train, test = blobs(50, 4, 3, spread=3.0), blobs(30, 4, 3, seed=1, spread=3.0)
    together = knn.classify(train["x"], train["label"], test["x"], 3, (20, 3, 7))
    for k in (3, 7, 20):
        alone = knn.classify(train["x"], train["label"], test["x"], 3, (k,))[k]
        np.testing.assert_array_equal(together[k], alone)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 31, 32, 33])
def test_chunks_do_not_change_the_answer(blobs, count):
    train, test = blobs(50, 4, 3, spread=3.0), blobs(count, 4, 3, seed=1, spread=3.0)
    whole = knn.classify(train["x"], train["label"], test["x"], 3, (10,), chunk=count)[10]
    found = knn.classify(train["x"], train["label"], test["x"], 3, (10,), chunk=16)[10]
    assert found.shape == (count,)
    np.testing.assert_array_equal(found, whole)


def test_result_names_and_small_train_splits(identity, splits_of, blobs):
    data = blobs(30, 4, 3)
    one = knn.make(identity, splits_of(data, data), {})(jnp.float32(1), None)
    assert set(one) == {"knn/accuracy", "knn/accuracy_10"}  # 100 and 200 exceed the train split
    few = blobs(6, 4, 3)
    tiny = knn.make(identity, splits_of(few, data), {"k": 3})(jnp.float32(1), None)
    assert set(tiny) == {"knn/accuracy", "knn/accuracy_3"}  # the headline: all six


def test_floors(identity, splits_of, blobs):
    train, test = blobs(40, 4, 2), blobs(20, 4, 2, seed=1)
    calls = []
    for part in (train, test):  # class 1 has a bright left half; brightness itself is noise
        noise = np.random.default_rng(2).integers(0, 60, (len(part["x"]), 1, 1, 1))
        part["image"] = np.full((len(part["x"]), 32, 24, 3), 90) + noise
        part["image"][part["label"] == 1, :, :12] += 60
        part["image"] = part["image"].astype(np.uint8)
        part["x"] = np.ones_like(part["x"])  # features that know nothing
    test = {name: value[:15] for name, value in test.items()}
    splits = splits_of(train, test, batch_size=4, calls=calls)
    run = knn.make(identity, splits, {"floors": True, "k": (20,)})
    result = run(jnp.float32(1), None)
    assert result["knn/pixels"] == 1.0
    assert result["knn/chance"] == 8 / 15
    assert result["knn/accuracy"] < 0.6
    assert run(jnp.float32(2), None)["knn/pixels"] == 1.0
    assert calls == ["train", "test", "train", "test", "train", "test"]  # floors read once


def test_floors_without_images_are_refused(identity, splits_of, blobs):
    data = blobs(10, 4, 2)
    run = knn.make(identity, splits_of(data, data), {"floors": True})
    with pytest.raises(UserError, match="config.eval.knn.floors needs images .*; set it to False"):
        run(jnp.float32(1), None)
