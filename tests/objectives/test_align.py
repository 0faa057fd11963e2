"""ALIGN's training against plain computations, and its batch norms on a mesh."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bivl
import image_texts
import runs
from bivl import train
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.models.towers import TextProjection
from bivl.objectives import contrastive

CONFIG = "configs/pretrain/align.py:smoke"
SETTINGS = {
    "image_size": 16,
    "batch_size": 8,
    "steps": 3,
    "tokenizer.kind": "bytes",
    "model.widths": (8, 8, 16),
    "model.repeats": (1, 2, 1),
    "model.kernels": (3, 3, 5),
    "model.strides": (1, 2, 2),
    "model.expansions": (1, 2, 2),
    "model.drop_path": 0.0,
    "model.text.width": 16,
    "model.text.depth": 1,
    "model.text.num_heads": 2,
    "model.text.mlp_dim": 24,
    "model.text.dropout": 0.0,
    "model.text.attention_dropout": 0.0,
    "model.text.rows": 10,
    "pair.length": 10,
    "contrast.width": 16,
    "data.num_examples": 16,
    "data.image_size": 16,
    "evaluators": (),
}
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    return image_texts.config(CONFIG, SETTINGS, **changes)


@functools.cache
def objective():
    return contrastive.make(config())


@functools.cache
def trees():
    """Random ones; variances are positive, and so is the temperature."""
    params, teacher, extras = image_texts.created(objective())
    params["heads"]["temperature"]["value"] = jnp.float32(0.2)
    extras = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.exp(x) if path[-1].key == "variance" else x, extras
    )
    return params, teacher, extras


def batch():
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 260, (8, 10)).astype(np.int32)
    tokens[1::2, 6:] = 1
    images = rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    return {"image": jnp.asarray(images), "tokens": jnp.asarray(tokens)}


@functools.cache
def trained():
    """(loss, aux, gradients)."""

    def run(trees):
        params, _, extras = trees
        grad = jax.value_and_grad(objective().loss, has_aux=True)
        (loss, aux), grads = grad(params, extras, batch(), {}, jax.random.key(0))
        return loss, aux, grads

    return jax.tree.map(np.asarray, jax.jit(run)(trees()))


def plain_loss(images, texts, temperature, smoothing):
    """The mean of both directions, with smoothed labels."""
    logits, rows = images.astype(np.float64) @ texts.T / temperature, len(images)
    labels = (1 - smoothing) * np.eye(rows) + smoothing / rows
    losses = [-(labels * image_texts.log_softmax(x)).sum(-1).mean() for x in (logits, logits.T)]
    return sum(losses) / 2


def test_the_loss_is_the_plain_one():
    """Without smoothing it is CLIP's; both from vectors that inference gives."""
    params, _, extras = trees()
    predict = jax.jit(
        lambda p, e, b: [objective().predict[f"{n}_embeddings"](p, e, b) for n in ("image", "text")]
    )
    images, texts = map(np.asarray, predict(params, extras, batch()))
    for smoothing in (0.0, 0.1):
        value, _ = contrastive.info_nce(images, texts, -math.log(0.2), smoothing)
        np.testing.assert_allclose(value, plain_loss(images, texts, 0.2, smoothing), rtol=1e-5)
    logits = objective().predict["logits"](params, extras, batch())
    np.testing.assert_allclose(logits, images @ texts.T / 0.2, rtol=1e-4, atol=1e-5)


def test_everything_gets_gradients():
    params = jax.tree_util.tree_flatten_with_path(trees()[0])[0]
    names = {"/".join(key.key for key in path[:2]) for path, _ in params}
    assert image_texts.moved(trained()[2]) == names


def test_statistics_move_in_an_update_alone():
    old, aux = trees()[2], trained()[1]
    _, new, _ = objective().update({}, old, trees()[0], aux, 1)
    assert jax.tree.structure(new) == jax.tree.structure(jax.tree.map(np.asarray, old))
    moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), old, new)
    assert all(jax.tree.leaves(moved))


def test_the_temperature_is_held_and_comes_back():
    """Where it is lower it is read as 0.01, and its gradient only leads up."""
    params, _, extras = trees()
    heads = params["heads"] | {"temperature": {"value": jnp.float32(-0.5)}}
    given = params | {"heads": heads}, extras, batch(), {}, jax.random.key(0)
    aux = jax.jit(objective().loss)(*given)[1]
    np.testing.assert_allclose(aux["metrics"]["temperature"], 0.01, rtol=1e-5)

    head = TextProjection(4, ("image", "text"), 1.0)

    def log_scale(value, sign):
        variables = {"params": {"temperature": {"value": value}}}
        return sign * head.apply(variables, 100.0, method="log_scale")

    slopes = [jax.grad(log_scale)(value, sign) for value in (0.5, 0.001) for sign in (1.0, -1.0)]
    np.testing.assert_allclose(slopes, [-2.0, 2.0, -100.0, 0.0], rtol=1e-5)


def test_statistics_are_loaded_and_come_along(tmp_path, one_device):
    """What batch norms saw; that they see the batch of all devices is in test_pretrain.py."""
    alone = train.train(config(), tmp_path / "one")
    loaded = bivl.load(tmp_path / "one")
    images = {"image": np.asarray(batch()["image"])}
    wanted = contrastive.make(config()).predict["encode"](alone.params, alone.extras, images)
    np.testing.assert_allclose(loaded.encode(images)["pooled"], wanted["pooled"], atol=1e-4)
    assert loaded.encode(images)["tokens"].shape == (8, 4, 16)
    further = train.train(config(init=str(tmp_path / "one"), steps=0), tmp_path / "further")
    runs.assert_same(further.extras, alone.extras)


def test_the_shipped_config_has_the_published_sizes():
    """EfficientNet-B7 without its top, BERT-base without its pooler and types."""
    c = configs.load("configs/pretrain/align.py:size=base")
    with c.unlocked():
        c.tokenizer.kind, c.model.text.vocabulary = "bytes", 30_522
    shapes = jax.eval_shape(contrastive.make(c).init, jax.random.key(0))[0]
    counts = {k: sum(math.prod(x.shape) for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    bert = 109_482_240 - 768 * 768 - 768 - 2 * 768
    assert counts["text_embed"] + counts["text_trunk"] == bert
    assert counts["heads"] == 768 * 640 + 640 + 1
    assert c.batch_size == 16_384 and c.steps == 1_200_000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contrast__width": 8}, "config.contrast.width=8 must be 16, the width of the last map"),
        ({"image_size": 7}, "config.image_size=7 is too small to be halved 3 times; raise it"),
        ({"model__trunk": "resnet"}, "config.model.trunk='resnet' is unknown"),
        ({"model__strides": (1, 2)}, "give one for each stage"),
        ({"optimizer__accumulate": 2}, "config.optimizer.accumulate=2: contrast compares the whol"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        contrastive.make(config(**changes))
