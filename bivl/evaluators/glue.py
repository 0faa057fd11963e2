"""GLUE's metrics on a task's development set (Wang et al. 2018, arXiv 1804.07461).

Which task is scored by what follows huggingface/evaluate: metrics/glue/glue.py. A task's score is
the mean of its metrics, as published tables report them: MRPC and QQP accuracy and F1, STS-B the
two correlations. MNLI's two development sets are two runs with two eval_data.test.
"""

import numpy as np

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.evaluators import features
from bivl.evaluators.accuracy import answers, check_classes

NEEDS = ("label",)  # fields that both splits must have


def make(predict, splits, config=None):
    """The metrics of a GLUE task from predict["logits"], as `run(params, extras) -> dict`.

    Logits are [B, C], of which the highest is the answer, or for stsb [B, 1], the similarity.
    Setting: `task`, one of TASKS. Results on the test split: `glue/TASK_METRIC` for each metric of
    the task, and `glue/score`, their mean. Raises UserError as `accuracy.answers` does, for another
    number of logits than the task has, and for labels that do not fit it.
    """
    options = features.settings(config, "glue", task="")
    task = choice("eval.glue.task", options["task"], TASKS)
    metrics, outputs = TASKS[task]

    def run(params, extras):
        said, labels = [], []
        for logits, truth in answers(predict, splits, "glue", params, extras):
            if logits.shape[1:] != (outputs,):
                raise UserError(
                    f"config.eval.glue.task={task!r} needs {outputs} logits an example and the "
                    f"model gives {logits.shape[1:]}; set the task this model was trained for"
                )
            if outputs == 1:
                _check_scores(truth)
            else:
                check_classes(truth, outputs, splits.classes)
            said.append(logits[:, 0] if outputs == 1 else logits.argmax(axis=1))
            labels.append(truth)
        said, labels = np.concatenate(said), np.concatenate(labels)
        found = {name: METRICS[name](said, labels) for name in metrics}
        score = float(np.mean(list(found.values())))
        return {f"glue/{task}_{name}": v for name, v in found.items()} | {"glue/score": score}

    return run


def _check_scores(labels):
    if labels.ndim != 1 or not np.isfinite(labels).all() or labels.min() < 0:
        raise UserError(
            "stsb needs a similarity from 0 to 5 an example and eval_data.test has others (GLUE "
            "hides those of its test sets: -1); choose a labelled eval_data.test.split"
        )


def accuracy(said, labels) -> float:
    """The share of right answers."""
    return float(np.mean(said == labels))


def f1(said, labels) -> float:
    """2 TP / (2 TP + FP + FN) of class 1; 0 where it occurs nowhere."""
    right = np.sum((said == 1) & (labels == 1))
    total = np.sum(said == 1) + np.sum(labels == 1)
    return float(2 * right / total) if total else 0.0


def mcc(said, labels) -> float:
    """Matthews' correlation coefficient of two classes; 0 where all answers or labels are equal."""
    tp, tn = np.sum((said == 1) & (labels == 1)), np.sum((said == 0) & (labels == 0))
    fp, fn = np.sum((said == 1) & (labels == 0)), np.sum((said == 0) & (labels == 1))
    # As floats: the product of four counts passes 63 bits from some 100,000 examples.
    scale = np.sqrt(np.prod(np.array([tp + fp, tp + fn, tn + fp, tn + fn], np.float64)))
    return float((float(tp) * tn - float(fp) * fn) / scale) if scale else 0.0


def pearson(said, labels) -> float:
    """The linear correlation; 0 where one side is constant."""
    x, y = (np.asarray(values, np.float64) for values in (said, labels))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(said, labels) -> float:
    """The linear correlation of the ranks, equal values sharing their mean rank."""
    return pearson(_ranks(said), _ranks(labels))


def _ranks(values):
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


METRICS = {"accuracy": accuracy, "f1": f1, "mcc": mcc, "pearson": pearson, "spearman": spearman}
# task: (metrics, logits)
TASKS = {
    "cola": (("mcc",), 2),
    "sst2": (("accuracy",), 2),
    "mrpc": (("accuracy", "f1"), 2),
    "qqp": (("accuracy", "f1"), 2),
    "stsb": (("pearson", "spearman"), 1),
    "mnli": (("accuracy",), 3),
    "qnli": (("accuracy",), 2),
    "rte": (("accuracy",), 2),
    "wnli": (("accuracy",), 2),
}
