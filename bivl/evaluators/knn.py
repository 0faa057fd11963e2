"""k nearest neighbours with weighted votes, after DINO (facebookresearch/dino: eval_knn.py).

Features are scaled to unit length. The k training images of the highest cosine similarity vote
for their class with weight exp(similarity / T), T = 0.07; the class with most votes is the answer.
The headline number uses k = 20. Both splits must come with evaluation preprocessing, no augmenting.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bivl.core.distributed import to_host
from bivl.core.errors import UserError
from bivl.evaluators import features

HEADLINE = 20
CELLS = 2**25  # similarities held at once: 128 MiB of float32
NEEDS = ("label",)  # fields that both splits must have


def make(predict, splits, config=None):
    """kNN accuracy of predict["features"], as `run(params, extras) -> dict`.

    Settings: `k` (10, 20, 100, 200), `temperature` 0.07, `floors` False. Results: `knn/accuracy`
    (k = 20, or the train size where that is smaller) and `knn/accuracy_K` for the other k; a k
    above the train size is left out. With `floors`, two numbers any learnt feature must beat:
    `knn/pixels`, the same kNN on the images shrunk to 16x16 pixels, and `knn/chance`, the share of
    the most frequent class of the test split. Raises UserError as `features.labelled` does.
    """
    options = features.settings(config, "knn", k=(10, 20, 100, 200), temperature=0.07, floors=False)
    ks = features.numbers(options["k"], "config.eval.knn.k")
    temperature = features.number(options["temperature"], "config.eval.knn.temperature", float)
    floor = {}  # the images do not change between calls: measured once

    def run(params, extras):
        train, test, num_classes = features.labelled(predict, splits, params, extras)
        size = len(train.labels)
        headline = min(HEADLINE, size)
        wanted = sorted({headline, *(k for k in ks if k <= size)})
        answers = classify(
            train.features, train.labels, test.features, num_classes, wanted, temperature
        )
        accuracy = {k: float(np.mean(answers[k] == test.labels)) for k in wanted}
        others = {f"knn/accuracy_{k}": accuracy[k] for k in wanted if k != headline}
        if options["floors"] and not floor:
            pixels = classify(*_pixels(splits, train.labels), num_classes, [headline], temperature)
            floor["knn/pixels"] = float(np.mean(pixels[headline] == test.labels))
            floor["knn/chance"] = float(np.bincount(test.labels).max() / len(test.labels))
        return {"knn/accuracy": accuracy[headline], **others, **floor}

    return run


def classify(train, labels, test, num_classes, ks, temperature=0.07, chunk=None):
    """Answers of a kNN classifier: a dict k -> int32 [N], one class number a test row.

    train [Ntrain, E] with labels [Ntrain] in 0..num_classes-1, test [N, E]; every k <= Ntrain.
    `chunk` test rows are compared at a time (None: as many as fit CELLS); the result does not
    depend on it. Ties go to the lower class number.
    """
    ks = tuple(sorted(ks))
    chunk = chunk or max(1, min(len(test), CELLS // len(train)))
    chunks = -(-len(test) // chunk)
    # Rows of zeros fill the last chunk, so that every chunk has one shape and compiles once.
    padded = np.zeros((chunks * chunk, test.shape[1]), np.float32)
    padded[: len(test)] = test
    train = _unit(jnp.asarray(train, jnp.float32))
    answers = [
        np.asarray(_vote(train, labels, rows, temperature, num_classes, ks))
        for rows in np.split(padded, chunks)
    ]
    return dict(zip(ks, np.concatenate(answers, axis=1)[:, : len(test)], strict=True))


def _unit(x):
    """Rows of length one; a row of zeros stays zero."""
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(jax.jit, static_argnames=("num_classes", "ks"))
def _vote(train, labels, rows, temperature, num_classes, ks):
    """train [Ntrain, E] of unit length, rows [N, E] -> answers [len(ks), N]."""
    # The default precision of a TPU (bfloat16 products) would reorder close neighbours.
    similarity = jnp.matmul(_unit(rows), train.T, precision="highest")  # [N, Ntrain]
    nearest, index = jax.lax.top_k(similarity, ks[-1])  # best first
    weight = jnp.exp(nearest / temperature)
    voted = jnp.asarray(labels)[index]
    row = jnp.arange(len(rows))[:, None]
    votes = jnp.zeros((len(rows), num_classes))
    answers, start = [], 0
    for k in ks:  # the votes for a smaller k are part of those for the next
        votes = votes.at[row, voted[:, start:k]].add(weight[:, start:k])
        answers.append(jnp.argmax(votes, axis=-1))
        start = k
    return jnp.stack(answers).astype(jnp.int32)


def _pixels(splits, labels):
    """(train, labels, test) of shrunk images [N, 16*16*3], less the mean image of train."""
    train, test = (_thumbnails(splits, split) for split in ("train", "test"))
    if train.shape[1] != test.shape[1]:
        raise UserError(
            "eval_data.train and eval_data.test give images of different sizes; set "
            "config.eval.knn.floors=False"
        )
    mean = train.mean(axis=0)
    return train - mean, labels, test - mean


def _thumbnails(splits, split):
    """Every real image of a split as float32 [N, 16*16*3]."""
    rows = []
    for batch in splits.batches(split):
        if "image" not in batch:
            raise UserError(
                f"config.eval.knn.floors needs images and eval_data.{split} has none; set it to "
                "False"
            )
        rows.append(to_host(_shrink(batch["image"]))[np.asarray(batch["mask"], bool)])
    return np.concatenate(rows)


@jax.jit
def _shrink(images):
    """images [B, H, W, 3] -> float32 [B, 16*16*3], averaging neighbours where it shrinks."""
    size = (len(images), 16, 16, images.shape[-1])
    small = jax.image.resize(images.astype(jnp.float32), size, "linear", antialias=True)
    return small.reshape(len(images), -1)
