"""Relative positions: a table that all layers share, and one for each layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bivl.models.positions import RelativePositionBias
from bivl.models.transformer import Encoder, EncoderConfig, Tokens

GRID, H, DEPTH = (2, 3), 2, 3
L, ROWS = 7, 3 * 5 + 3


def draw(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


def biases(table):
    """The bias of a table [R, H], or of one for each layer [N, R, H]."""
    module = RelativePositionBias(GRID, H, layers=len(table) if table.ndim == 3 else 0)
    return module.apply({"params": {"table": {"value": table}}})


def test_each_layer_has_a_table_of_its_own():
    tables = draw(DEPTH, ROWS, H)
    found = biases(tables)
    assert found.shape == (DEPTH, 1, H, L, L)
    for one, table in zip(found, tables, strict=True):
        np.testing.assert_array_equal(one, biases(table))
    boxed = RelativePositionBias(GRID, H, layers=DEPTH).init(jax.random.key(0))["params"]
    assert boxed["table"]["value"].names == ("layers", None, "heads")


@pytest.mark.parametrize("scan", [False, True])
def test_the_encoder_hands_each_layer_its_own(scan):
    """Layer by layer it is the encoder of one layer with that layer's bias."""
    sizes = {"width": 8, "num_heads": H, "mlp_dim": 8, "final_norm": False}
    encoder = Encoder(EncoderConfig(depth=DEPTH, scan=scan, **sizes))
    x, bias = draw(2, L, 8), biases(draw(DEPTH, ROWS, H))
    params = nn.unbox(encoder.init(jax.random.key(0), Tokens(x)))["params"]
    layers = encoder.apply({"params": params}, Tokens(x, bias=bias), collect=("layers",)).layers
    for i, one in enumerate(bias):
        own = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], params)
        alone = Encoder(EncoderConfig(depth=1, **sizes))
        out = alone.apply({"params": own}, Tokens(layers[i], bias=one)).tokens
        np.testing.assert_allclose(out, layers[i + 1], atol=1e-6)
    assert not np.allclose(layers[1], encoder.apply({"params": params}, Tokens(x)).tokens)
