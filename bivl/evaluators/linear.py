"""Linear probe: multinomial logistic regression on frozen features, fitted by L-BFGS.

The recipe is CLIP's (Radford et al. 2021, appendix A.3): features of the frozen model without
augmentation, one full-batch L-BFGS fit of a logistic regression, its L2 strength searched on
held-out data, then a last fit on all of train. Differences: features are standardised (mean 0,
deviation 1, from train) so that one grid suits every model; the held-out data are a fifth of train,
class by class, not a validation split; the grid has 9 values, a factor of 10 apart, not 96; a fit
takes at most 200 iterations, not 1000, each started from the one before, strongest L2 first; L2 is
counted per example (see `fit`), so that it does not depend on the number of examples. SGD probes
with augmentation (DINO, BEiT, MAE) give other, often higher, numbers: do not compare across.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from bivl.core.errors import UserError
from bivl.evaluators import features, lbfgs

HELD_OUT = 5  # every fifth example of a class picks the L2 strength
CELLS = 2**26  # logits held at once: 256 MiB of float32
NEEDS = ("label",)  # fields that both splits must have


def make(predict, splits, config=None):
    """Linear accuracy of predict["features"], as `run(params, extras) -> dict`.

    Settings: `l2` strengths to try (10, 1, ..., 1e-7), `max_iterations` 200, `tolerance` 1e-5 (see
    `fit`). Results: `linear/accuracy` on test and `linear/l2`, the strength chosen: by held-out
    accuracy, ties by held-out loss. Raises UserError as `features.labelled` does, and for fewer
    than five training examples, of which none could be held out.
    """
    options = features.settings(
        config,
        "linear",
        l2=tuple(10.0**power for power in range(1, -8, -1)),
        max_iterations=200,
        tolerance=1e-5,
    )
    grid = sorted(features.numbers(options["l2"], "config.eval.linear.l2", float), reverse=True)
    iterations = features.number(options["max_iterations"], "config.eval.linear.max_iterations")
    tolerance = features.number(options["tolerance"], "config.eval.linear.tolerance", float)

    def run(params, extras):
        train, test, num_classes = features.labelled(predict, splits, params, extras)
        if len(train.labels) < HELD_OUT:
            raise UserError(
                f"the linear probe holds out a fifth of eval_data.train, which has only "
                f"{len(train.labels)} examples; give it {HELD_OUT} or more"
            )
        return probe(train, test, num_classes, grid, iterations, tolerance)

    return run


def probe(train, test, num_classes, grid, max_iterations=200, tolerance=1e-5):
    """Search `grid` (L2 strengths, strongest first) on a fifth of train, refit, score on test.

    train, test: Features with labels in 0..num_classes-1. Returns the evaluator's results.
    """
    mean, std = train.features.mean(axis=0), train.features.std(axis=0) + 1e-5
    inside, outside = ((part.features - mean) / std for part in (train, test))
    held = held_out(train.labels)
    everything = np.ones(len(held), np.float32)
    rows = _chunks(inside, train.labels, num_classes)
    solve = functools.partial(fit, rows, max_iterations=max_iterations, tolerance=tolerance)
    start = {
        "kernel": jnp.zeros((inside.shape[1], num_classes)),
        "bias": jnp.zeros(num_classes),
    }
    weights, tried = start, []
    for l2 in grid:
        weights, steps = solve(everything - held, l2, weights)
        accuracy, loss = score(weights, inside[held], train.labels[held])
        tried.append((-accuracy, loss, l2, weights))
        logging.info(
            "linear probe: l2 %.1e, held-out accuracy %.4f, loss %.4f, %d iterations",
            l2, accuracy, loss, steps,
        )  # fmt: skip
    *_, l2, weights = min(tried, key=lambda one: one[:2])
    weights, _ = solve(everything, l2, weights)
    accuracy, _ = score(weights, outside, test.labels)
    return {"linear/accuracy": accuracy, "linear/l2": float(l2)}


def held_out(labels):
    """labels [N] -> bool [N], True for a fixed random fifth of each class, within one example."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # random inside each class
    held = np.zeros(len(labels), bool)
    held[order[HELD_OUT - 1 :: HELD_OUT]] = True
    return held


def score(weights, x, labels):
    """Accuracy and mean cross-entropy (nats) of weights on x [N, E] with labels [N]."""
    logits = x @ np.asarray(weights["kernel"]) + np.asarray(weights["bias"])
    logits = logits - logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels]
    return float(np.mean(logits.argmax(axis=1) == labels)), float(loss.mean())


def _chunks(x, labels, num_classes):
    """x [N, E], labels [N] -> ([n, R, E], [n, R]), n chunks of R rows, zeros filling the last."""
    rows = min(len(x), max(1, CELLS // num_classes))
    chunks = -(-len(x) // rows)
    padded = np.zeros((chunks * rows, x.shape[1]), np.float32)
    padded[: len(x)] = x
    numbers = np.zeros(chunks * rows, np.int32)
    numbers[: len(x)] = labels
    # On the device once: every fit reads the same rows.
    return jnp.asarray(padded.reshape(chunks, rows, -1)), jnp.asarray(numbers.reshape(chunks, rows))


def fit(rows, counted, l2, start, max_iterations=200, tolerance=1e-5):
    """Minimise mean_i CE(softmax(x_i W + b), y_i) + l2/2 * |W|^2 by L-BFGS, b unregularised.

    rows: from `_chunks`. counted [N]: 1 for an example to fit, 0 for one left out. start: a dict
    of kernel [E, C] and bias [C]. Stops when no entry of the gradient exceeds `tolerance`, or after
    `max_iterations`. Returns weights like start, and the iterations used. scikit-learn's
    LogisticRegression(C=1 / (l2 * N)) has the same minimum.
    """
    x, labels = rows
    padded = np.zeros(labels.size, np.float32)
    padded[: len(counted)] = counted
    weights, steps = _minimise(
        x, labels, padded.reshape(labels.shape), l2, start, max_iterations, tolerance
    )
    return weights, int(steps)


@jax.jit
def _minimise(x, labels, counted, l2, start, max_iterations, tolerance):
    @jax.checkpoint  # the logits of one chunk at a time, also in the backward pass
    def add_chunk(total, chunk, weights):
        inputs, label, count = chunk
        logits = jnp.matmul(inputs, weights["kernel"], precision="highest") + weights["bias"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return total + jnp.sum(each * count)

    def loss(weights):
        total, _ = jax.lax.scan(
            lambda total, chunk: (add_chunk(total, chunk, weights), None),
            0.0,
            (x, labels, counted),
        )
        return total / jnp.sum(counted) + 0.5 * l2 * jnp.sum(weights["kernel"] ** 2)

    return lbfgs.minimise(loss, start, max_iterations, tolerance)
