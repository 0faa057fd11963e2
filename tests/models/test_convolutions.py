"""Grouped convolutions group by group against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.models import convolutions

CASES = {  # lengths, kernel, groups, channels, width, padding
    "square": ((5, 7), 3, 4, 8, 12, (1, 1)),
    "positions": ((23,), 4, 2, 6, 6, (2, 1)),
    "inside": ((9, 8), 3, 2, 4, 2, (0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_group_after_the_other_equals_xla(name):
    lengths, k, groups, channels, width, padding = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *lengths, channels)), jnp.float32)
    shape = (*[k] * len(lengths), channels // groups, width)
    kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    padding = (padding,) * len(lengths)

    def outputs(convolve):
        y, pull = jax.vjp(convolve, x, kernel)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    ways = (
        lambda x, kernel: convolutions._by_groups(x, kernel, groups, padding),
        lambda x, kernel: convolutions._by_xla(x, kernel, groups, 1, padding),
    )
    for got, wanted in zip(*map(outputs, ways), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
