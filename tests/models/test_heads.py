"""The heads of VQA and NLVR2 against plain computations in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import image_texts as plain
from bivl.models.heads import AnswerHead, ComparisonHead
from bivl.models.transformer import Tokens

WIDTH, IMAGES, TEXTS = 8, 5, 3


def tokens(rows):
    """[rows, L, D] of an image's tokens and a text's, and their layout."""
    x = jax.random.normal(jax.random.key(0), (rows, IMAGES + TEXTS, WIDTH))
    return x, Tokens(x, special=1, images=IMAGES)


def drawn(model, x, layout):
    """Random parameters, large enough to show."""
    shapes = jax.eval_shape(model.init, jax.random.key(1), x, layout, True)["params"]
    rng = np.random.default_rng(2)
    return {
        name: {k: np.float32(0.3 * rng.standard_normal(box.value.shape)) for k, box in part.items()}
        for name, part in shapes.items()
    }


def norm(x, part):
    return np.stack([plain.normalized(row, -1) for row in x]) * part["scale"] + part["bias"]


def test_an_answer_is_read_from_the_image_alone():
    (x, layout), model = tokens(3), AnswerHead(7)
    p = drawn(model, x, layout)
    assert p["fc"]["kernel"].shape == (WIDTH, 2 * WIDTH) and p["logits"]["bias"].shape == (7,)
    h = np.tanh(plain.linear(norm(x[:, 0], p["pooler_norm"]), p["pooler"]))
    h = plain.gelu(norm(plain.linear(h, p["fc"]), p["norm"]))
    found = model.apply({"params": p}, x, layout, True)
    np.testing.assert_allclose(found, plain.linear(h, p["logits"]), atol=1e-5)
    assert found.dtype == jnp.float32


def test_two_images_are_compared_in_their_order():
    (x, layout), model = tokens(4), ComparisonHead(2)
    p = drawn(model, x, layout)
    both = [np.concatenate([x[i, 0], x[i, IMAGES], x[i + 1, 0], x[i + 1, IMAGES]]) for i in (0, 2)]
    h = plain.gelu(norm(plain.linear(norm(both, p["norm1"]), p["dense"]), p["norm2"]))
    found = model.apply({"params": p}, x, layout, True)
    np.testing.assert_allclose(found, plain.linear(h, p["logits"]), atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_both_maps_begin_small(scale):
    x = jnp.ones((2, 4, 64))
    layout = Tokens(x, special=1, images=3)
    tree = ComparisonHead(50, scale).init(jax.random.key(0), x, layout, True)["params"]
    for name in ("dense", "logits"):
        kernel = tree[name]["kernel"].value
        # Cut at one std of 0.02, as BEiT-3's code draws them.
        assert abs(kernel).max() <= 0.02 * scale * (1 + 1e-6)
        assert float(kernel.std()) == pytest.approx(0.0108 * scale, rel=0.05)
        assert not tree[name]["bias"].value.any()
