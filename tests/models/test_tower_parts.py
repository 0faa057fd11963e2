"""What the parts of two towers are: activation, causal attention, initialisers, the text's end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.modalities import towers
from bivl.models.attention import attend, causal_bias
from bivl.models.layers import quick_gelu
from bivl.models.transformer import EncoderConfig, init_blocks

pytestmark = pytest.mark.usefixtures("quick_compile")
SIZES = {"width": 64, "depth": 3, "num_heads": 4, "mlp_dim": 256}


def test_quick_gelu_by_hand():
    x = np.array([-3.0, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(quick_gelu(jnp.array(x)), x / (1 + np.exp(-1.702 * x)), rtol=1e-6)


def test_nothing_is_read_that_stands_behind():
    """Not even by a row of which all that stands before is padding."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 4)).astype(np.float32)
    bias = causal_bias(5)
    out, weights = attend(q, k, v, bias)
    assert not np.triu(np.asarray(weights), 1).any()
    for length in range(1, 6):
        alone, _ = attend(*(x[:, :, :length] for x in (q, k, v)))
        np.testing.assert_allclose(out[:, :, length - 1], alone[:, :, -1], atol=1e-6)
    hidden, _ = attend(q, k, v, bias + bias.min() * jnp.ones((1, 1, 1, 5)))
    assert np.isfinite(hidden).all()


@pytest.mark.parametrize("init", ["clip", "torch"])
def test_kernels_start_at_their_own_sizes(init):
    config = EncoderConfig(**SIZES, init=init)
    blocks = jax.tree.map(
        lambda box: np.asarray(box.value),
        init_blocks(config, jax.random.key(0)),
        is_leaf=lambda x: hasattr(x, "names"),
    )
    std = {
        "clip": {"qkv": 64**-0.5, "out": 384**-0.5, "fc1": 128**-0.5, "fc2": 384**-0.5},
        "torch": {"qkv": 128**-0.5, "out": 192**-0.5, "fc1": 192**-0.5, "fc2": 768**-0.5},
    }[init]
    parts = blocks["attention"] | blocks["mlp"]
    for name, wanted in std.items():
        kernel = parts[name]["kernel"]
        np.testing.assert_allclose(kernel.std(axis=tuple(range(1, kernel.ndim))), wanted, rtol=0.1)
        if init == "torch":
            assert np.abs(kernel).max() <= 3**0.5 * wanted * 1.0001
        assert not parts[name].get("bias", np.zeros(1)).any()


def test_an_activation_that_is_none():
    with pytest.raises(UserError, match="config.model.activation='relu' is unknown; use one of"):
        EncoderConfig(**SIZES, activation="relu")


def test_the_end_of_a_text():
    """The first `end`, and the first token where there is none; or the highest id."""
    ids = jnp.array([[7, 3, 9, 9, 0], [7, 9, 3, 8, 8], [7, 1, 1, 1, 1]])
    embed = {"vocabulary": 10, "rows": 5, "width": 4, "end": 9, "pad": 0, "dtype": "float32"}
    by_end = towers.TextEmbed(**embed, pool="end")
    assert by_end.last(ids).tolist() == [2, 1, 0]
    other = towers.TextEmbed(**embed | {"end": 8}, pool="highest")
    assert other.last(ids).tolist() == [2, 1, 0]
    assert towers.TextEmbed(**embed | {"end": 8}, pool="end").last(ids).tolist() == [0, 3, 0]
