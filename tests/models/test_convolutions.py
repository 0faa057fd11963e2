"""Grouped convolutions as matmuls against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.models import convolutions

CASES = {  # lengths, kernel, groups, channels, width, stride, padding
    "square": ((5, 7), 3, 4, 8, 12, 1, (1, 1)),
    "positions": ((23,), 4, 2, 6, 6, 1, (2, 1)),
    "strided": ((9, 8), 3, 2, 4, 2, 2, (0, 0)),
}


@pytest.mark.parametrize("name", CASES)
def test_matmuls_over_shifted_copies_equal_xla(name):
    lengths, k, groups, channels, width, stride, padding = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, *lengths, channels)), jnp.float32)
    shape = (*[k] * len(lengths), channels // groups, width)
    kernel = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    options = groups, stride, [padding] * len(lengths)

    def outputs(convolve):
        y, pull = jax.vjp(lambda x, kernel: convolve(x, kernel, *options), x, kernel)
        return y, *pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

    ways = convolutions._by_matmul, convolutions._by_xla
    for got, wanted in zip(*map(outputs, ways), strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-4)
