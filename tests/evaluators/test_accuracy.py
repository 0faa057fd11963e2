import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from bivl.core.errors import GuardStop, UserError
from bivl.evaluators import accuracy, features


@pytest.fixture
def logits_of():
    """predict: the logits of an example are its `x`."""
    return {"logits": lambda params, extras, batch: batch["x"] * params}


def draw(count, num_classes, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, num_classes)).astype(np.float32)
    return {"x": x, "label": rng.integers(num_classes, size=count)}


@pytest.mark.parametrize("count", [7, 8, 21])
def test_agrees_with_scikit_learn(logits_of, splits_of, count):
    data = draw(count, 9)
    run = accuracy.make(logits_of, splits_of(draw(3, 9), data), {})
    found = run(jnp.float32(2), None)
    assert found["accuracy/top1"] == pytest.approx(
        accuracy_score(data["label"], data["x"].argmax(axis=1))
    )
    assert found["accuracy/top5"] == pytest.approx(
        top_k_accuracy_score(data["label"], data["x"], k=5, labels=range(9))
    )


def test_top_five_needs_more_than_five_classes(logits_of, splits_of):
    for num_classes, expected in ((5, {"accuracy/top1"}), (6, {"accuracy/top1", "accuracy/top5"})):
        data = draw(10, num_classes)
        run = accuracy.make(logits_of, splits_of(data, data))
        assert set(run(jnp.float32(1), None)) == expected


def test_equal_logits_are_no_answer_to_everything():
    ranks = accuracy.rank(np.zeros((3, 4)), np.array([0, 1, 3]))
    assert ranks.tolist() == [0, 1, 3]
    assert accuracy.rank(np.array([[1.0, 3.0, 2.0, 3.0]] * 4), np.arange(4)).tolist() == [
        3,
        0,
        2,
        1,
    ]


def test_what_cannot_be_scored_is_refused(logits_of, splits_of):
    data = draw(6, 3)

    def run(predict, test):
        return accuracy.make(predict, splits_of(data, test), {})(jnp.float32(1), None)

    with pytest.raises(UserError, match="no 'logits' to score; take accuracy out of"):
        run({}, data)
    with pytest.raises(UserError, match="eval_data.test has no labels; "):
        run(logits_of, {"x": data["x"]})
    with pytest.raises(UserError, match="the label 3 but the model tells 3 classes apart; "):
        run(logits_of, data | {"label": np.array([0, 1, 2, 3, 0, 0])})
    with pytest.raises(UserError, match="the label -1, which marks unlabelled"):
        run(logits_of, data | {"label": np.array([0, 1, 2, -1, 0, 0])})
    with pytest.raises(GuardStop, match="not finite"):
        run(logits_of, data | {"x": data["x"] * np.float32(np.nan)})
    with pytest.raises(UserError, match="eval_data.test has no examples"):
        empty = features.Splits(lambda split: iter(()), None)
        accuracy.make(logits_of, empty)(jnp.float32(1), None)
    with pytest.raises(UserError, match="config.eval.accuracy has no key 'k'"):
        accuracy.make(logits_of, splits_of(data, data), {"k": 3})
