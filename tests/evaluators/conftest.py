"""A model that returns its input, and splits of plain arrays: probes with known features."""

import jax.numpy as jnp
import numpy as np
import pytest

from bivl.evaluators import features


@pytest.fixture
def identity():
    """predict: the features of an example are its `x`, scaled by params."""
    return {"features": lambda params, extras, batch: batch["x"] * params}


@pytest.fixture
def splits_of():
    """A function of two dicts of arrays (`x`, perhaps `label`, `image`) -> Splits."""
    return _splits_of


@pytest.fixture
def blobs():
    """A function that draws Gaussian clusters round fixed centres."""
    return _blobs


def _splits_of(train, test, batch_size=8, classes=None, calls=None):
    """Padded as data/ pads: by the last example. `calls` records each pass by its split."""

    def batches(split):
        if calls is not None:
            calls.append(split)
        arrays = {"train": train, "test": test}[split]
        count = len(next(iter(arrays.values())))
        arrays = {**arrays, "id": np.arange(count)}
        for start in range(0, count, batch_size):
            index = np.arange(start, start + batch_size)
            batch = {k: v[np.minimum(index, count - 1)] for k, v in arrays.items()}
            device = {k: jnp.asarray(v) for k, v in batch.items() if k not in ("label", "id")}
            host = {k: v for k, v in batch.items() if k in ("label", "id")}
            yield {**device, **host, "mask": index < count}

    return features.Splits(batches, classes)


def _blobs(count, width, num_classes, seed=0, spread=1.0):
    """dict of x [count, width] float32 and label [count], classes in turn."""
    centres = np.random.default_rng(123).normal(size=(num_classes, width))
    label = np.arange(count) % num_classes
    noise = np.random.default_rng(seed).normal(size=(count, width))
    return {"x": (centres[label] + spread * noise).astype(np.float32), "label": label}
