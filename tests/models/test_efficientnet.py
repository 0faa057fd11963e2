"""EfficientNet's sizes, and its layers against plain computations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core.errors import UserError
from bivl.models import spatial
from bivl.models.efficientnet import EfficientNet, EfficientNetConfig
from bivl.models.transformer import Tokens

pytestmark = pytest.mark.usefixtures("quick_compile")
SMALL = {"widths": (8, 8), "repeats": (1, 2), "kernels": (3, 5), "strides": (1, 2)}
SMALL |= {"expansions": (1, 2), "width_scale": 0.5, "depth_scale": 1.0}


@pytest.mark.parametrize(
    ("scales", "published", "top", "blocks"),
    [((1.0, 1.0), 5_288_548, 1280, 16), ((1.2, 1.4), 12_233_232, 1536, 26)]
    + [((2.0, 3.1), 66_347_960, 2560, 55)],
)
def test_the_published_sizes(scales, published, top, blocks):
    """B0, B3 and B7, less what ALIGN leaves out: the last convolution, its norm and the classes."""
    c = EfficientNetConfig(width_scale=scales[0], depth_scale=scales[1])
    made = jax.eval_shape(
        EfficientNet(c).init, jax.random.key(0), Tokens(jnp.zeros((1, 64, 64, 3)))
    )
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(made["params"]))
    assert count == published - (top * 1000 + 1000) - c.width * top - 2 * top
    assert len(c.blocks()) == c.depth == blocks and c.width == 320 * scales[0]


@pytest.mark.parametrize(("stride", "shift"), [(1, True), (2, True), (2, False)])
def test_depthwise_convolutions_are_sums_over_places(stride, shift):
    """On both ways; with stride 2 a map of 7 becomes 3 where padding is shifted, else 4."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 7, 7, 3)), rng.standard_normal((5, 5, 1, 3))
    layer = spatial.SpatialConvolution(5, stride, shift=shift)
    got = layer.apply({"params": {"kernel": jnp.float32(kernel)}}, jnp.float32(x))
    before = 1 if stride == 2 and shift else 2
    padded = np.pad(x, ((0, 0), (before, 2), (before, 2), (0, 0)))
    side = (padded.shape[1] - 5) // stride + 1
    assert got.shape == (2, side, side, 3) and side == {1: 7, 2: 3 if shift else 4}[stride]
    for i in range(side):
        for j in range(side):
            top, left = i * stride, j * stride
            window = padded[:, top : top + 5, left : left + 5]
            wanted = (window * kernel[:, :, 0]).sum((1, 2))
            np.testing.assert_allclose(got[:, i, j], wanted, atol=1e-4)
    padded = jnp.float32(padded)
    other = spatial._depthwise_by_xla(padded, jnp.float32(kernel), stride)
    np.testing.assert_allclose(got, other, atol=1e-4)


def test_batch_norm_by_hand():
    x = np.random.default_rng(0).standard_normal((4, 3, 2, 5)).astype(np.float32)
    layer = spatial.BatchNorm(eps=0.5, decay=0.75)
    variables = layer.init(jax.random.key(0), x, True)
    np.testing.assert_allclose(layer.apply(variables, x, True), x / math.sqrt(1.5), rtol=1e-5)
    y, new = layer.apply(variables, x, False, mutable=["statistics"])
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 0.5), atol=1e-5)
    np.testing.assert_allclose(new["statistics"]["mean"], 0.25 * mean, atol=1e-6)
    np.testing.assert_allclose(new["statistics"]["variance"], 0.75 + 0.25 * variance, rtol=1e-5)


def test_residual_branches_are_dropped_in_training_alone():
    c = EfficientNetConfig.of(SMALL | {"drop_path": 0.9}, "float32")
    model, tokens = EfficientNet(c), Tokens(jnp.ones((64, 8, 8, 3)))
    variables = model.init(jax.random.key(0), tokens)
    run = jax.jit(
        lambda key: (
            model.apply(
                variables, tokens, False, ("layers",), rngs={"dropout": key}, mutable=["statistics"]
            )[0].layers
        )
    )
    layers = run(jax.random.key(1))
    kept = np.abs(np.asarray(layers[-1] - layers[-2])).max((1, 2)) > 0
    assert 10 < kept.sum() < 45  # the last of three blocks: 0.6 are dropped
    same = model.apply(variables, tokens, True).tokens
    np.testing.assert_array_equal(same, model.apply(variables, tokens).tokens)


def test_the_last_map_is_read_row_by_row():
    c = EfficientNetConfig.of(SMALL, "float32")
    model = EfficientNet(c)
    tokens = Tokens(jnp.zeros((2, 16, 12, 3)))
    shapes = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), tokens, True, ("layers",))[0]
    )
    assert shapes.tokens.shape == (2, 4 * 3, 8)
    assert [x.shape[1] for x in shapes.layers] == [48, 48, 12, 12] and c.side(16) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"widths": (8,)}, "numbers; give one for each stage"),
        ({"strides": (1, 3)}, "config.model.strides=.1, 3. must be whole numbers"),
        ({"kernels": (2, 3)}, "kernels odd"),
        ({"repeats": (1, 0)}, "config.model.repeats=.1, 0. must be"),
        ({"repeats": (1, 1.5)}, "config.model.repeats"),
        ({"centred": (-1,)}, "config.model.centred"),
        ({"depth_scale": 900.0}, "makes 2700 blocks, more than 1000; lower it"),
        ({"width_scale": 0.0}, "config.model.width_scale=0.0 must be positive"),
        ({"decay": 1.0}, r"config.model.decay=1.0 must lie in \[0, 1\)"),
    ],
)
def test_what_no_tower_can_be(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        EfficientNetConfig.of(SMALL | changes, "float32")
    assert "\n" not in str(caught.value)
