"""What fine-tuning configs share: pre-training configs less what only pre-training reads."""

from configs import common

PRETRAINING = (
    "head",
    "decoder",
    "top_k_layers",
    "target",
    "loss",
    "ema_decay_start",
    "ema_decay_end",
    "ema_anneal_steps",
    "ema_shared",
    "teacher_dtype",
    "masking",
    "mask_ratio",
)


def start(c, objective: str):
    """A pre-training config (unlocked) -> one of `objective` with the same encoder and inputs.

    The optimizer is that of configs.common; masking, data and batch are still to be set.
    """
    c.objective, c.optimizer = objective, common.base().optimizer
    c.evaluate_every = 0
    for key in set(PRETRAINING) & set(c):
        del c[key]
    return c


def classifier(c, classes: int, **changes) -> None:
    """The keys that bivl/objectives/classify.py reads, as for images."""
    c.num_classes, c.smoothing, c.label_scale = classes, 0.0, 1.0
    c.classifier = {"pool": "mean", "norm": True, "hidden": False, "dropout": 0.0, "scale": 1.0}
    c.classifier.update(changes)
