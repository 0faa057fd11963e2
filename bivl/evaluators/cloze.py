"""Cloze probe for text: name the masked tokens from the frozen features at their positions.

data2vec regresses features and never names a token, so its loss does not say what it knows of the
text. Here a linear softmax over the vocabulary is fitted on masked positions of the train split
and scored on those of the test split, with the masks of training (kept and replaced tokens among
them). It adds to the logarithm of the unigram probabilities, which are the floor beside it: with no
features, or unlimited L2, the probe is the unigram model. It is a measure of this package, to
compare runs on the same tokens and masks; no published number belongs beside it.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from bivl.core.distributed import to_host
from bivl.core.errors import GuardStop, UserError
from bivl.evaluators import features, lbfgs

MOST = 20_000  # masked positions of a split
HELD_OUT = 5  # the last fifth of the train positions picks the L2 strength
CELLS = 2**25  # logits held at once: 128 MiB of float32


def make(predict, splits, config=None):
    """Cross-entropy of the cloze probe, as `run(params, extras) -> dict`.

    predict["masked"](params, extras, batch) gives features [B, L, E] of the masked input;
    `splits.masked(split)` gives batches with `tokens` int [B, L], the clean ids, and `mask` bool
    [B, L] or [B, M, L], the masks of training.

    Settings: `vocabulary`, its size, or 0 for the largest id seen + 1; `positions` 20,000, the most
    there may be, of each split; `batches` 200, read at most; `l2` strengths (0.1, 0.01, 1e-3,
    1e-4), tried from the strongest until the held-out loss rises; `max_iterations` 50 of each fit.
    Results on test: `cloze/loss` (nats a token) and `cloze/accuracy`, the same of the unigram model
    as `cloze/unigram_loss` and `cloze/unigram_accuracy`, and `cloze/l2`, the strength chosen.
    """
    options = features.settings(
        config,
        "cloze",
        vocabulary=0,
        positions=MOST,
        batches=200,
        l2=(0.1, 0.01, 1e-3, 1e-4),
        max_iterations=50,
    )
    key = "config.eval.cloze"
    positions = min(features.number(options["positions"], f"{key}.positions"), MOST)
    batches = features.number(options["batches"], f"{key}.batches")
    grid = sorted(features.numbers(options["l2"], f"{key}.l2", float), reverse=True)
    iterations = features.number(options["max_iterations"], f"{key}.max_iterations")
    vocabulary = options["vocabulary"] and features.number(
        options["vocabulary"], f"{key}.vocabulary"
    )

    def run(params, extras):
        train, test = (
            masked_positions(predict, splits, split, batches, positions, params, extras)
            for split in ("train", "test")
        )
        if len(train[1]) < HELD_OUT:
            raise UserError(
                f"the cloze probe needs {HELD_OUT} masked tokens of eval_data.train and found "
                f"{len(train[1])}; give it more text"
            )
        largest = int(max(train[1].max(), test[1].max()))
        if vocabulary and largest >= vocabulary:
            raise UserError(f"{key}.vocabulary={vocabulary} but token {largest} occurs; raise it")
        return probe(train, test, vocabulary or largest + 1, grid, iterations)

    return run


def masked_positions(predict, splits, split, batches, most, params, extras):
    """(features float32 [N, E], tokens [N]) of the first `most` masked positions of a split."""
    none = "this objective has no 'masked' features of text; take cloze out of config.evaluators"
    if "masked" not in predict or getattr(splits, "masked", None) is None:
        raise UserError(none)
    rows, tokens, missing = [], [], most
    for batch in itertools.islice(splits.masked(split), batches):
        if "tokens" not in batch:  # images and speech have masks as well
            raise UserError(none)
        mask = to_host(batch["mask"]).astype(bool)
        mask = mask[:, 0] if mask.ndim == 3 else mask  # of several masks the first
        found = to_host(predict["masked"](params, extras, batch))[mask][:missing]
        rows.append(found.astype(np.float32))
        tokens.append(to_host(batch["tokens"])[mask][:missing])
        missing -= len(found)
        if missing == 0:
            break
    if missing == most:
        raise UserError(f"eval_data.{split} has no masked tokens; check eval_data.{split}.split")
    whole = np.concatenate(rows)
    if not np.isfinite(whole).all():
        raise GuardStop(
            f"the features of eval_data.{split} are not finite: the model has diverged; "
            "evaluate an earlier step or lower optimizer.learning_rate"
        )
    return whole, np.concatenate(tokens)


def probe(train, test, vocabulary, grid, max_iterations=50):
    """Search `grid` (L2, strongest first) on the last fifth of train, refit, score on test.

    train, test: (features [N, E], tokens [N]). Returns the evaluator's results.
    """
    mean, std = train[0].mean(axis=0), train[0].std(axis=0) + 1e-5
    (inside, known), (outside, asked) = (((x - mean) / std, y) for x, y in (train, test))
    part = len(known) - len(known) // HELD_OUT  # later positions: from other batches, mostly
    classes, fitted = Classes.of(known[:part], vocabulary), []
    weights = classes.start(inside.shape[1])
    for l2 in grid:
        weights = fit(inside[:part], known[:part], classes, l2, weights, max_iterations)
        loss, accuracy = score(weights, inside[part:], known[part:], classes)
        fitted.append((loss, l2))
        logging.info("cloze: l2 %.1e, held-out loss %.4f, accuracy %.4f", l2, loss, accuracy)
        if loss > min(fitted)[0]:
            break  # weaker ones would fit train still closer
    _, l2 = min(fitted)
    classes = Classes.of(known, vocabulary)
    start = classes.start(inside.shape[1])
    weights = start
    for stronger in (one for one in grid if one >= l2):  # the same path to it as in the search
        weights = fit(inside, known, classes, stronger, weights, max_iterations)
    loss, accuracy = score(weights, outside, asked, classes)
    unigram_loss, unigram_accuracy = score(start, outside, asked, classes)
    return {
        "cloze/loss": loss,
        "cloze/accuracy": accuracy,
        "cloze/unigram_loss": unigram_loss,
        "cloze/unigram_accuracy": unigram_accuracy,
        "cloze/l2": float(l2),
    }


@dataclasses.dataclass(frozen=True)
class Classes:
    """The vocabulary as the fit sees it: the C - 1 tokens seen, and one class of all the others.

    The unseen tokens have equal unigram probabilities and no examples, so at the optimum their
    columns are equal, and one column stands for all. It saves most of a large vocabulary.

    column [V]: the class of a token. sizes [C]: tokens of each. log_prior [C]: the logarithm of
    their add-one smoothed unigram probability, summed over the class.
    """

    column: np.ndarray
    sizes: np.ndarray
    log_prior: np.ndarray

    @classmethod
    def of(cls, tokens, vocabulary):
        """From the tokens [N] to fit, ids below `vocabulary`."""
        count = np.bincount(tokens, minlength=vocabulary)
        seen = np.flatnonzero(count)
        sizes = np.ones(len(seen))
        mass = count[seen] + 1.0
        column = np.full(vocabulary, len(seen))
        column[seen] = np.arange(len(seen))
        if others := vocabulary - len(seen):
            sizes, mass = np.append(sizes, others), np.append(mass, others)
        prior = np.log(mass / (len(tokens) + vocabulary))
        return cls(column, sizes.astype(np.float32), prior.astype(np.float32))

    def start(self, width):
        """The weights [width + 1, C] of the unigram model: zeros."""
        return jnp.zeros((width + 1, len(self.sizes)))


def score(weights, x, tokens, classes):
    """Mean cross-entropy (nats) and accuracy of weights [E + 1, C] on x [N, E], tokens [N].

    A token that the fit has not seen is never answered right: all of them are equally likely.
    """
    kernel, sizes = np.asarray(weights), classes.sizes
    rows = max(1, CELLS // kernel.shape[1])
    losses, right = [], []
    for begin in range(0, len(x), rows):
        label = classes.column[tokens[begin : begin + rows]]
        logits = x[begin : begin + rows] @ kernel[:-1] + kernel[-1] + classes.log_prior
        logits -= logits.max(axis=1, keepdims=True)
        # Of a token: its part of its class.
        logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True)) + np.log(sizes)
        losses.append(-logits[np.arange(len(label)), label])
        right.append((logits.argmax(axis=1) == label) & (sizes[label] == 1))
    return float(np.concatenate(losses).mean()), float(np.concatenate(right).mean())


def fit(x, tokens, classes, l2, start, max_iterations=50, tolerance=1e-5):
    """Minimise the mean cross-entropy of x [N, E], tokens [N] by L-BFGS -> weights [E + 1, C].

    The logits are x W + b + log prior. The penalty is l2 / 2 times the squares of all entries, b
    too, over all tokens: a column that stands for many counts as many. It draws the probe to the
    unigram model. Stops when no entry of the gradient exceeds `tolerance`.
    """
    rows = min(len(x), max(1, CELLS // len(classes.sizes)))
    chunks = -(-len(x) // rows)
    padded = np.zeros((chunks * rows, x.shape[1] + 1), np.float32)
    padded[: len(x)] = np.pad(x, ((0, 0), (0, 1)), constant_values=1.0)
    labels = np.zeros(chunks * rows, np.int32)
    labels[: len(x)] = classes.column[tokens]
    counted = (np.arange(chunks * rows) < len(x)).astype(np.float32)
    shape = chunks, rows
    weights, _ = _minimise(
        padded.reshape(*shape, -1), labels.reshape(shape), counted.reshape(shape),
        classes.log_prior, classes.sizes, l2, start, max_iterations, tolerance,
    )  # fmt: skip
    return weights


@jax.jit
def _minimise(x, labels, counted, log_prior, sizes, l2, start, max_iterations, tolerance):
    @jax.checkpoint  # the logits of one chunk at a time, also in the backward pass
    def add_chunk(total, chunk, weights):
        inputs, label, count = chunk
        logits = jnp.matmul(inputs, weights, precision="highest") + log_prior
        each = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        return total + jnp.sum(each * count)

    def loss(weights):
        total, _ = jax.lax.scan(
            lambda total, chunk: (add_chunk(total, chunk, weights), None),
            0.0,
            (x, labels, counted),
        )
        return total / jnp.sum(counted) + 0.5 * l2 * jnp.sum(sizes * weights**2)

    return lbfgs.minimise(loss, start, max_iterations, tolerance, memory=5)
