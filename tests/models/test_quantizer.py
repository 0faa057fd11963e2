"""The cosine codebook against recorded numbers, and what must hold for every codebook."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core import sharding
from bivl.models import quantizer
from golden import vqkd as golden

G = golden.load()


def draw(seed, *shape):
    return quantizer.unit(jax.random.normal(jax.random.key(seed), shape))


def test_codes_and_losses_match_the_reference():
    units, codebook = G["vqkd/units"], G["vqkd/codebook"]
    codes = quantizer.nearest(units, codebook)
    np.testing.assert_array_equal(codes, G["vqkd/codes"])
    loss = quantizer.commitment(units, codebook[codes])
    np.testing.assert_allclose(loss, G["vqkd/loss/quantization"], rtol=1e-5)


def test_moves_of_the_codebook_match_the_reference():
    book = G["vqkd/codebook"]
    unused = np.setdiff1d(np.arange(len(book)), G["vqkd/codes"])
    found = quantizer.totals(G["vqkd/units"], G["vqkd/codes"], len(book))
    np.testing.assert_array_equal(found["counts"], np.bincount(G["vqkd/codes"].ravel(), None, 12))
    for wanted in G["vqkd/moved"]:
        moved = quantizer.moved(book, found, 0.99)
        np.testing.assert_allclose(moved, wanted, atol=1e-6)
        assert len(unused) and (moved[unused] == book[unused]).all()
        book = moved
    assert np.abs(book - G["vqkd/codebook"]).max() > 1e-3


def test_kmeans_matches_the_reference():
    samples, centres = G["kmeans/samples"], jnp.asarray(G["kmeans/centres"])
    for count in (1, 3, 10):
        got = quantizer.kmeans(samples, centres, count)
        np.testing.assert_allclose(got, G["kmeans/history"][count - 1], atol=1e-5)
    np.testing.assert_array_equal(got[-1], centres[-1])  # an empty cluster


def test_vectors_stay_of_unit_length_and_unused_ones_as_they_are():
    vectors = draw(0, 64, 8)

    @jax.jit
    def body(vectors, key):
        units = quantizer.unit(jax.random.normal(key, (2, 10, 8)))
        codes = quantizer.nearest(units, vectors)
        return quantizer.moved(vectors, quantizer.totals(units, codes, 64), 0.9), codes

    for seed in range(20):
        moved, codes = body(vectors, jax.random.key(100 + seed))
        unused = np.setdiff1d(np.arange(64), codes)
        assert len(unused) >= 44 and (moved[unused] == vectors[unused]).all()
        assert not np.allclose(moved[codes], vectors[codes], atol=1e-3)
        vectors = moved
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-6)


def test_the_first_of_equal_codes_is_chosen_and_zero_has_a_length():
    assert quantizer.nearest(jnp.ones((1, 2)), jnp.ones((3, 2))) == 0
    gradient = jax.grad(lambda x: quantizer.unit(x).sum())(jnp.zeros(3))
    assert np.isfinite(gradient).all() and not quantizer.unit(jnp.zeros(3)).any()


def test_gradients_pass_straight_through():
    units, vectors = draw(1, 5, 4), draw(2, 7, 4)
    chosen = vectors[quantizer.nearest(units, vectors)]
    weight = jnp.arange(20.0).reshape(5, 4)
    value, gradient = jax.value_and_grad(
        lambda u: (quantizer.straight_through(u, chosen) * weight).sum()
    )(units)
    np.testing.assert_allclose(value, (chosen * weight).sum(), rtol=1e-5)
    np.testing.assert_array_equal(gradient, weight)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_kmeans_is_the_same_on_every_mesh(sizes):
    """Of the global batch: no device fits a codebook of its own."""
    units = np.asarray(draw(3, 16, 20, 8))
    fit = functools.partial(quantizer.fit, jax.random.key(5), size=32, iterations=10)
    wanted = jax.jit(lambda u: fit(u.reshape(-1, 8)))(units)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes, strict=True)))
    with sharding.use(mesh):
        placed = sharding.to_global({"units": units}, mesh, 16)["units"]
        got = jax.jit(lambda u: fit(u.reshape(-1, 8)))(placed)
    assert len(placed.sharding.device_set) == 8
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=-1), 1, rtol=1e-6)


def test_kmeans_starts_from_different_vectors_and_gets_nearer():
    units = draw(4, 200, 4)
    start = quantizer.fit(jax.random.key(0), units, 50, 0)
    assert len(np.unique(np.asarray(start), axis=0)) == 50
    cosines = [
        (units @ quantizer.kmeans(units, start, count).T).max(-1).mean() for count in (0, 1, 10)
    ]
    assert cosines[0] < cosines[1] < cosines[2]


def test_perplexity():
    np.testing.assert_allclose(quantizer.perplexity(jnp.array([3.0, 3, 3, 3])), 4, rtol=1e-6)
    np.testing.assert_allclose(quantizer.perplexity(jnp.array([0.0, 7, 0, 0])), 1, rtol=1e-6)


def test_a_new_codebook():
    book = quantizer.create(jax.random.key(0), 6, 4)
    np.testing.assert_allclose(np.linalg.norm(book["vectors"], axis=-1), 1, rtol=1e-6)
    assert not book["fitted"] and (book["idle"] == quantizer.NEVER).all()
