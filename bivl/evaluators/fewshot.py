"""Few-shot least-squares regression (google-research/big_vision: evaluators/fewshot_lsr.py).

s random examples a class ("shots") are standardised with their own mean and deviation, a constant
feature 100 is appended, so large that the bias is hardly regularised, and a ridge regression of
strength 2^10 onto targets of +1 (own class) and -1 (others) is solved in closed form.

Differences from the source: float64 on the host by a direct solve, where it uses float32 and an
eigendecomposition to share work between ridge strengths; the mean over the seeds is reported.
"""

import numpy as np

from bivl.evaluators import features

NEEDS = ("label",)  # fields that both splits must have


def make(predict, splits, config=None):
    """Few-shot accuracy of predict["features"], as `run(params, extras) -> dict`.

    Settings: `shots` (1, 5, 10, 25), `seeds` 3, `ridge` 2**10, `bias` 100. Results:
    `fewshot/accuracy_K` on the whole test split, mean over the seeds. A class with fewer than K
    training examples gives all it has. Raises UserError as `features.labelled` does.
    """
    options = features.settings(
        config, "fewshot", shots=(1, 5, 10, 25), seeds=3, ridge=2.0**10, bias=100.0
    )
    shots = features.numbers(options["shots"], "config.eval.fewshot.shots")
    seeds = features.number(options["seeds"], "config.eval.fewshot.seeds")
    strength = features.number(options["ridge"], "config.eval.fewshot.ridge", float)
    bias = features.number(options["bias"], "config.eval.fewshot.bias", float)

    def run(params, extras):
        train, test, num_classes = features.labelled(predict, splits, params, extras)
        accuracy = {shot: [] for shot in shots}
        for seed in range(seeds):
            order = shuffled_classes(train.labels, num_classes, seed)
            for shot in shots:
                index = np.concatenate([members[:shot] for members in order])
                answers = classify(
                    train.features[index], train.labels[index], test.features, num_classes,
                    strength, bias,
                )  # fmt: skip
                accuracy[shot].append(np.mean(answers == test.labels))
        return {f"fewshot/accuracy_{shot}": float(np.mean(accuracy[shot])) for shot in shots}

    return run


def shuffled_classes(labels, num_classes, seed):
    """The example numbers of each class in random order, a list of [n_c] arrays.

    The first s of each are the s shots, so more shots of one seed contain the fewer.
    """
    rng = np.random.default_rng(seed)
    return [rng.permutation(np.flatnonzero(labels == number)) for number in range(num_classes)]


def classify(shots, labels, test, num_classes, strength=2.0**10, bias=100.0):
    """Answers [N] for test [N, E] of the regression fitted to shots [S, E] with labels [S]."""
    mean, std = shots.mean(axis=0), shots.std(axis=0) + 1e-5

    def prepare(x):
        return np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=bias)

    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    weights = ridge(prepare(shots.astype(np.float64)), targets, strength)
    # The fit wants float64; 24 bits are enough to compare scores, at half the memory.
    return np.argmax(prepare(test) @ weights.astype(np.float32), axis=1)


def ridge(x, y, strength, form=None):
    """The W [D, C] that minimises |xW - y|^2 + strength * |W|^2, for x [N, D] and y [N, C].

    form "primal" is (x'x + strength I)^-1 x'y and "dual" x'(xx' + strength I)^-1 y. They are equal;
    None takes the smaller system: primal where N >= D.
    """
    if form is None:
        form = "primal" if len(x) >= x.shape[1] else "dual"
    if form == "primal":
        return np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
    return x.T @ np.linalg.solve(x @ x.T + strength * np.eye(len(x)), y)
