import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from bivl.core.errors import UserError
from bivl.evaluators import glue


@pytest.fixture
def logits_of():
    """predict: the logits of an example are its `x`."""
    return {"logits": lambda params, extras, batch: batch["x"] * params}


def draw(count, outputs, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, outputs)).astype(np.float32)
    if outputs == 1:
        # Fifths, as STS-B's means of five judges are: many ties.
        label = np.clip(np.round(5 * (x[:, 0] + rng.normal(size=count) + 2)) / 5, 0, 5)
        return {"x": x, "label": label.astype(np.float32)}
    likely = np.where(rng.random(count) < 0.5, x.argmax(axis=1), rng.integers(outputs, size=count))
    return {"x": x, "label": likely}


def run(logits_of, splits_of, task, data):
    return glue.make(logits_of, splits_of(data, data), {"task": task})(jnp.float32(1), None)


def reference(task, data):
    """The task's metrics by scikit-learn and scipy."""
    x, label = data["x"], data["label"]
    said = x.argmax(axis=1)
    if task == "stsb":
        pearson = stats.pearsonr(x[:, 0].astype(float), label.astype(float)).statistic
        return {"pearson": pearson, "spearman": stats.spearmanr(x[:, 0], label).statistic}
    if task == "cola":
        return {"mcc": metrics.matthews_corrcoef(label, said)}
    found = {"accuracy": metrics.accuracy_score(label, said)}
    if task in ("mrpc", "qqp"):
        found["f1"] = metrics.f1_score(label, said)
    return found


@pytest.mark.parametrize("task", sorted(glue.TASKS))
def test_agrees_with_scikit_learn_and_scipy(logits_of, splits_of, task):
    outputs = {"mnli": 3, "stsb": 1}.get(task, 2)
    data = draw(61, outputs)
    found = run(logits_of, splits_of, task, data)
    expected = reference(task, data)
    assert set(found) == {f"glue/{task}_{name}" for name in expected} | {"glue/score"}
    for name, value in expected.items():
        assert found[f"glue/{task}_{name}"] == pytest.approx(value, abs=1e-6)
    assert found["glue/score"] == pytest.approx(np.mean(list(expected.values())), abs=1e-6)
    assert 0.1 < found["glue/score"] < 0.95


def test_constant_answers_are_zero_and_not_nan():
    labels, same = np.array([0, 1, 1, 0]), np.ones(4, int)
    assert glue.mcc(same, labels) == 0.0 == metrics.matthews_corrcoef(labels, same)
    assert glue.mcc(labels, same) == 0.0
    assert glue.mcc(labels, labels) == pytest.approx(1.0)
    assert glue.f1(np.zeros(4), np.zeros(4)) == 0.0
    assert glue.pearson(same, labels) == 0.0 == glue.spearman(labels, same)


def test_ranks_of_ties():
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    np.testing.assert_array_equal(glue._ranks(values), stats.rankdata(values))


def test_mcc_of_many_examples_does_not_overflow():
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=400_000)
    said = np.where(rng.random(400_000) < 0.7, labels, 1 - labels)
    expected = np.corrcoef(said, labels)[0, 1]  # equal for two classes
    assert glue.mcc(said, labels) == pytest.approx(expected)


def test_what_does_not_fit_the_task_is_refused(logits_of, splits_of):
    with pytest.raises(UserError, match="config.eval.glue.task='' is unknown; use one of .*'cola'"):
        glue.make(logits_of, None, None)
    with pytest.raises(UserError, match="task='mnli' needs 3 logits an example and the model"):
        run(logits_of, splits_of, "mnli", draw(5, 2))
    with pytest.raises(UserError, match="task='stsb' needs 1 logits"):
        run(logits_of, splits_of, "stsb", draw(5, 2))
    hidden = draw(5, 1) | {"label": np.full(5, -1.0)}
    with pytest.raises(UserError, match="stsb needs a similarity from 0 to 5"):
        run(logits_of, splits_of, "stsb", hidden)
    with pytest.raises(UserError, match="the label -1, which marks unlabelled"):
        run(logits_of, splits_of, "rte", draw(5, 2) | {"label": np.full(5, -1)})
    with pytest.raises(UserError, match="the label 2 but the model tells 2 classes"):
        run(logits_of, splits_of, "rte", draw(5, 2) | {"label": np.full(5, 2)})
