"""Accuracy of a classifier's own answers on the test split; `answers` also serves glue."""

from collections.abc import Iterator

import numpy as np

from bivl.core.distributed import to_host
from bivl.core.errors import GuardStop, UserError
from bivl.evaluators import features

TOP = 5
NEEDS = ("label",)  # fields that both splits must have


def make(predict, splits, config=None):
    """Accuracy of predict["logits"] [B, C], as `run(params, extras) -> dict`.

    No settings. Results: `accuracy/top1`, and `accuracy/top5` where there are more than five
    classes: the share of test examples whose label has the highest, or one of the five highest,
    logits; equal logits rank by class number. Raises UserError as `answers` does, and for labels
    that are no class numbers or beyond the model's classes.
    """
    features.settings(config, "accuracy")

    def run(params, extras):
        ranks, num_classes = [], 0
        for logits, labels in answers(predict, splits, "accuracy", params, extras):
            num_classes = logits.shape[1]
            check_classes(labels, num_classes, splits.classes)
            ranks.append(rank(logits, labels))
        place = np.concatenate(ranks)
        found = {"accuracy/top1": float(np.mean(place == 0))}
        if num_classes > TOP:
            found["accuracy/top5"] = float(np.mean(place < TOP))
        return found

    return run


def answers(predict, splits, name, params, extras) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(logits float32 [n, C], labels [n]) of the real examples of each test batch.

    `name` is the evaluator's. Raises UserError where the model has no logits or the split no
    labels or examples, GuardStop where a logit is not finite.
    """
    if "logits" not in predict:
        raise UserError(
            f"this objective has no 'logits' to score; take {name} out of config.evaluators"
        )
    empty = True
    for batch in splits.batches("test"):
        mask = np.asarray(batch["mask"], bool)
        if "label" not in batch:
            features.check_labels(None, "test", splits.classes)
        output = predict["logits"](params, extras, features.model_inputs(batch))
        logits = to_host(output)[mask].astype(np.float32)
        if not np.isfinite(logits).all():
            raise GuardStop(
                "the logits of eval_data.test are not finite: the model has diverged; evaluate an "
                "earlier step or lower optimizer.learning_rate"
            )
        if mask.any():
            empty = False
            yield logits, np.asarray(batch["label"])[mask]
    if empty:
        raise UserError("eval_data.test has no examples; check eval_data.test.split")


def check_classes(labels, num_classes, classes):
    """Raise UserError unless labels [n] are class numbers below num_classes."""
    features.check_labels(labels, "test", classes)
    if labels.max() >= num_classes:
        raise UserError(
            f"eval_data.test holds the label {labels.max()} but the model tells {num_classes} "
            "classes apart; evaluate on the data set it was trained for"
        )


def rank(logits, labels):
    """How many classes come before the label: int [n], 0 for the model's answer.

    logits [n, C], labels [n]. Of equal logits the lower class number comes first.
    """
    own = logits[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)
