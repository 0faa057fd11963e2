"""What the probes share: the labelled splits they read and the features a model gives for them.

kNN, linear and few-shot read the same features, retrieval and zero-shot the same embeddings.
`extract` keeps them in `Splits.memory`, so that evaluators run one after another on the same
parameters pay for one pass over each split.
"""

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bivl.core.distributed import to_host
from bivl.core.errors import GuardStop, UserError

HOST_KEYS = ("label", "id", "mask")  # the numpy part of a batch; models never see it


@dataclasses.dataclass
class Splits:
    """The data an evaluator reads.

    batches: "train" or "test" -> one pass in order over GLOBAL batches: device arrays for the
        model's inputs, and numpy `label` [B], `id` [B], `mask` [B] (True = a real example, False =
        padding of the last batch). `label` is absent where the set has none.
    classes: the labels' names, or None where the set does not name them.
    examples: count -> that many training examples as the objective sees them (numpy, augmented,
        with `mask` where it masks), of a mixture {part: these}, or None where there are none to
        show.
    masked: "train" or "test" -> endless GLOBAL batches of device arrays as the objective trains on
        them, the same at every call.
    texts: strings -> one pass in order over GLOBAL batches of them as the model takes texts, with
        numpy `id` [B] (their running numbers) and `mask` [B] as in `batches`, or None.
    record: "train" or "test", a row of `Features.rows` -> the record itself (its `text` a string)
        with the model's numpy inputs in the place of its own (`image` uint8 [S, S, 3]), or None.
    normalization: (mean, std) of float images, or None for ImageNet's.
    memory: the newest features of each split (see `extract`); leave it alone.
    """

    batches: Callable[[str], Iterator[dict[str, Any]]]
    classes: tuple[str, ...] | None
    examples: Callable[[int], dict[str, np.ndarray]] | None = None
    masked: Callable[[str], Iterator[dict[str, Any]]] | None = None
    texts: Callable[[Sequence[str]], Iterator[dict[str, Any]]] | None = None
    record: Callable[[str, int], dict[str, Any]] | None = None
    normalization: tuple | None = None
    memory: dict[tuple[str, str], Any] = dataclasses.field(default_factory=dict, repr=False)


@dataclasses.dataclass(frozen=True)
class Features:
    """The real examples of one split: features [N, E] float32, labels [N] or None, ids [N], and
    rows [N], their running numbers in the split (which counts records that cannot be decoded)."""

    features: np.ndarray
    labels: Any
    ids: np.ndarray
    rows: np.ndarray


def model_inputs(batch):
    """The batch without its numpy part: what a predict function takes."""
    return {name: value for name, value in batch.items() if name not in HOST_KEYS}


def require(predict, evaluator: str, *names: str) -> None:
    """Raise UserError unless the objective has all the predict functions that `evaluator` reads."""
    for name in names:
        if name not in predict:
            raise UserError(
                f"this objective has no '{name}'; take {evaluator} out of config.evaluators"
            )


def extract(predict, splits, split, params, extras, name="features") -> Features:
    """What predict[name] gives for every real example of a split, in order.

    predict[name](params, extras, batch) gives [B, E]. The result is remembered for this params and
    extras (the same array objects) until the split is asked for with others; only weak references
    to the parameters are kept, so remembering never holds device memory.
    Raises UserError for an empty split, GuardStop where the features are not finite.
    """
    require(predict, "knn, linear and fewshot", name)
    function = predict[name]
    leaves = [function, *jax.tree.leaves((params, extras))]
    references, found = splits.memory.get((split, name), ((), None))
    if len(references) == len(leaves) and all(
        reference() is leaf for reference, leaf in zip(references, leaves, strict=True)
    ):
        return found
    splits.memory.pop((split, name), None)  # free the old features before making the new ones
    batches, what = splits.batches(split), f"eval_data.{split}"
    found = _one_pass(function, batches, what, params, extras)
    if not len(found.ids):
        raise UserError(f"{what} has no examples; check {what}.split")
    splits.memory[split, name] = ([_reference(leaf) for leaf in leaves], found)
    return found


def embed_texts(predict, splits, texts: Sequence[str], params, extras) -> np.ndarray:
    """predict["text_embeddings"] of strings: float32 [len(texts), E], in order.

    Raises GuardStop where they are not finite.
    """
    function, batches = predict["text_embeddings"], splits.texts(texts)
    return _one_pass(function, batches, "the prompts", params, extras).features


def _one_pass(function, batches, what, params, extras) -> Features:
    """Run the model over batches. One computes while the one before it is copied out."""
    features, labels, ids, rows, pending, start = [], [], [], [], None, 0

    def collect(output, mask):
        features.append(to_host(output)[mask].astype(np.float32))

    for batch in batches:
        mask = np.asarray(batch["mask"], bool)
        output = function(params, extras, model_inputs(batch))
        if pending is not None:
            collect(*pending)
        pending = output, mask
        ids.append(np.asarray(batch["id"])[mask])
        rows.append(start + np.flatnonzero(mask))
        start += len(mask)
        if "label" in batch:
            labels.append(np.asarray(batch["label"])[mask])
    if pending is None:
        none = np.zeros(0, np.int32)
        return Features(np.zeros((0, 0), np.float32), None, none, none)
    collect(*pending)
    whole = np.concatenate(features)
    if not np.isfinite(whole).all():
        raise GuardStop(
            f"the features of {what} are not finite: the model has diverged; "
            "evaluate an earlier step or lower optimizer.learning_rate"
        )
    classes = np.concatenate(labels) if labels else None
    return Features(whole, classes, np.concatenate(ids), np.concatenate(rows))


def _reference(value):
    """A weak reference, or for the few values that allow none (plain numbers) a strong one."""
    try:
        return weakref.ref(value)
    except TypeError:
        return lambda: value


def labelled(predict, splits, params, extras) -> tuple[Features, Features, int]:
    """The train and test features with labels renumbered 0..C-1, and C, the classes in train.

    Raises UserError where a split has no labels, a label that is no class number, or where test
    has classes that train lacks (no probe could ever name them).
    """
    train = extract(predict, splits, "train", params, extras)
    test = extract(predict, splits, "test", params, extras)
    for split, part in (("train", train), ("test", test)):
        check_labels(part.labels, split, splits.classes)
    seen = np.unique(train.labels)
    strange = np.setdiff1d(test.labels, seen)
    if len(strange):
        first = splits.classes[strange[0]] if splits.classes else strange[0]
        raise UserError(
            f"eval_data.test has {len(strange)} of its classes nowhere in eval_data.train (first: "
            f"{first}); let both read the same data set, or give train more examples"
        )
    train, test = (
        dataclasses.replace(part, labels=np.searchsorted(seen, part.labels).astype(np.int32))
        for part in (train, test)
    )
    return train, test, len(seen)


def check_labels(labels, split, classes):
    """Raise UserError unless labels [N] are class numbers, and within `classes` where given."""
    if labels is None:
        raise UserError(
            f"eval_data.{split} has no labels; name the set's label field in "
            f"eval_data.{split}.fields.label, or take the probes out of config.evaluators"
        )
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels of eval_data.{split} are {labels.dtype} of shape {labels.shape}; the probes "
            f"need one class number an example, point eval_data.{split}.fields.label at it"
        )
    if labels.min() < 0:
        raise UserError(
            f"eval_data.{split} holds the label {labels.min()}, which marks unlabelled examples; "
            f"choose a labelled eval_data.{split}.split"
        )
    if classes and labels.max() >= len(classes):
        raise UserError(
            f"eval_data.{split} holds the label {labels.max()} but only {len(classes)} classes "
            "have names; let eval_data.train and eval_data.test read the same data set"
        )


def settings(config: Mapping | None, name: str, **defaults) -> dict[str, Any]:
    """The evaluator's defaults overlaid with its mapping config.eval.NAME (None = no setting).

    Raises UserError for a key that the evaluator does not know.
    """
    given = dict(config.items()) if config else {}
    unknown = sorted(set(given) - set(defaults))
    if unknown:
        raise UserError(
            f"config.eval.{name} has no key '{unknown[0]}'; it takes {', '.join(sorted(defaults))}"
        )
    return defaults | {key: value for key, value in given.items() if value is not None}


def numbers(value, key: str, kind: type = int) -> tuple:
    """One positive number or a sequence of them -> a tuple; `key` names it in the UserError."""
    items = value if isinstance(value, list | tuple) else (value,)
    if not items:
        raise UserError(f"{key} is empty; give one or more positive {kind.__name__} values")
    return tuple(number(item, key, kind) for item in items)


def number(value, key: str, kind: type = int):
    """A positive number of that kind, or a UserError that names `key`."""
    if not isinstance(value, int | float) or not value > 0 or kind(value) != value:
        raise UserError(f"{key} is {value!r}; give a positive {kind.__name__}")
    return kind(value)
