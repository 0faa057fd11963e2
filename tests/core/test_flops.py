"""FLOPs by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from bivl.core import flops


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_matmul():
    assert flops.count(jnp.matmul, shape(3, 4), shape(4, 5)) == 2 * 3 * 4 * 5


def test_batched_einsum():
    def attend(q, k):
        return jnp.einsum("BHQd,BHKd->BHQK", q, k)

    assert flops.count(attend, shape(2, 3, 5, 8), shape(2, 3, 7, 8)) == 2 * 2 * 3 * 5 * 7 * 8


def test_elementwise_work_is_left_out():
    assert flops.count(lambda x: jnp.exp(x) + x.sum(), shape(10, 10)) == 0


@pytest.mark.parametrize(("stride", "groups", "out"), [(1, 1, 8), (2, 1, 4), (1, 3, 8)])
def test_convolution(stride, groups, out):
    def convolve(x, w):
        axes = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, (stride, stride), "SAME", dimension_numbers=axes, feature_group_count=groups
        )

    found = flops.count(convolve, shape(2, 8, 8, 3), shape(5, 5, 3 // groups, 6))
    assert found == 2 * (2 * out * out * 6) * (5 * 5 * 3 // groups)


def test_a_scan_counts_every_turn():
    def body(x, w):
        return x @ w, None

    scan = jax.jit(lambda x, ws: lax.scan(body, x, ws)[0])
    assert flops.count(scan, shape(2, 4), shape(7, 4, 4)) == 7 * (2 * 2 * 4 * 4)

    def twice(x, ws):
        return lax.scan(lambda x, _: (scan(x, ws), None), x, length=3)[0]

    assert flops.count(twice, shape(2, 4), shape(7, 4, 4)) == 3 * 7 * (2 * 2 * 4 * 4)


def test_a_choice_counts_its_dearest_branch():
    def f(x, w):
        return lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w)

    assert flops.count(f, shape(2, 4), shape(4, 4)) == 2 * (2 * 2 * 4 * 4)


ONE = 2 * 8 * 4 * 5  # the forward pass of one layer


@pytest.mark.parametrize(
    ("differentiated", "passes"),
    [((0,), 2), ((1,), 2), ((0, 1), 3)],  # forward, and one matmul for each gradient
)
def test_gradient_of_a_dense_layer(differentiated, passes):
    f = jax.value_and_grad(lambda w, x: jnp.square(x @ w).sum(), differentiated)
    assert flops.count(f, shape(4, 5), shape(8, 4)) == passes * ONE


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_gradient_of_a_convolution(stride):
    """Between the values of a strided one's gradient there are zeros, which do not count."""

    def loss(x, w):
        y = lax.conv_general_dilated(
            x, w, (stride,), [(0, 0)], dimension_numbers=("NHC", "HIO", "NHC")
        )
        return jnp.square(y).sum()

    args = shape(2, 1000, 3), shape(10, 3, 4)
    found = flops.count(jax.value_and_grad(loss, (0, 1)), *args)
    assert found == pytest.approx(3 * flops.count(loss, *args), rel=0.02)


def test_two_layers():
    """The first layer's input gets no gradient: 3 + 2 passes."""

    def loss(ws, x):
        return jnp.square(x @ ws[0] @ ws[1]).sum()

    found = flops.count(jax.value_and_grad(loss), (shape(4, 4), shape(4, 4)), shape(8, 4))
    assert found == 5 * (2 * 8 * 4 * 4)


def test_recomputation_counts():
    def f(w, x):
        return jnp.square(jnp.sin(x @ w) @ w).sum()

    saved = flops.count(jax.value_and_grad(f), shape(4, 4), shape(8, 4))
    policy = jax.checkpoint_policies.nothing_saveable
    again = flops.count(
        jax.value_and_grad(jax.checkpoint(f, policy=policy)), shape(4, 4), shape(8, 4)
    )
    assert saved == 5 * (2 * 8 * 4 * 4)
    assert again > saved


def test_custom_gradients_count_once():
    @jax.custom_vjp
    def f(w, x):
        return x @ w

    f.defvjp(lambda w, x: (x @ w, (w, x)), lambda saved, dy: (saved[1].T @ dy, dy @ saved[0].T))
    assert flops.count(f, shape(4, 5), shape(8, 4)) == ONE
    grad = jax.value_and_grad(lambda w, x: jnp.square(f(w, x)).sum(), (0, 1))
    assert flops.count(grad, shape(4, 5), shape(8, 4)) == 3 * ONE
