"""Small training runs and what they leave behind, for the tests of the programs."""

import json

import jax
import numpy as np

SMALL = {
    "image_size": "32",
    "model.width": "32",
    "model.depth": "2",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "data.image_size": "32",
    "batch_size": "8",
    "evaluators": "",
    "steps": "4",
}


def tiny(changes=()):
    """The smoke config of data2vec on images, smaller still, with dotted `changes` (a dict)."""
    from bivl.core import config as configs

    config = configs.load("configs/pretrain/data2vec_image.py:smoke")
    configs.override(config, list((SMALL | dict(changes)).items()))
    return config


def lines(workdir, name="metrics") -> list[dict]:
    """The objects of a run's metrics.jsonl or evaluations.jsonl."""
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def losses(workdir) -> dict[int, float]:
    """Step -> loss; a step that has two lines fails."""
    found = [(line["step"], line["loss"]) for line in lines(workdir)]
    assert len(dict(found)) == len(found), f"a step has two lines: {[step for step, _ in found]}"
    return dict(found)


def assert_same(first, second) -> None:
    """Two trees of arrays are equal bit for bit."""
    first, second = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (first, second))
    assert len(first) == len(second)
    for (path, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(path))
