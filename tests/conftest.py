"""Eight forced host devices, one thread pool, parsed absl flags: set before jax starts."""

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from absl import flags

flags.FLAGS.mark_as_parsed()
jax.config.update("jax_numpy_rank_promotion", "allow")


@pytest.fixture
def tiny_config():
    """A data2vec image config small enough to compile in a second or two."""
    from bivl.core import config as configs

    config = configs.load("configs/pretrain/data2vec_image.py:smoke")
    small = {
        "image_size": "32",
        "model.width": "32",
        "model.depth": "3",
        "model.num_heads": "2",
        "model.mlp_dim": "128",
        "data.image_size": "32",
        "batch_size": "8",
        "evaluators": "",
        "steps": "4",
    }
    configs.override(config, list(small.items()))
    return config
