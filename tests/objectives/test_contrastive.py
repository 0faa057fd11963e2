"""Contrast of images and texts against hand and plain computations."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import image_texts
from bivl.core import config as configs
from bivl.core import ema, optimizer
from bivl.core.errors import UserError
from bivl.model import make_objective
from bivl.objectives import contrastive

CONFIG = "configs/finetune/contrastive.py:smoke"
SETTINGS = image_texts.SMALL | {"contrast.width": 8, "batch_size": 4}
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    return image_texts.config(CONFIG, SETTINGS, **changes)


@functools.cache
def objective(pool="first", text="encoder"):
    return contrastive.make(config(contrast__pool=pool, contrast__text=text))


@functools.cache
def trees(*heads):
    return image_texts.created(objective(*heads))


def batch():
    pairs = image_texts.batch()["pairs"]
    return {name: pairs[name] for name in ("image", "tokens")}


@functools.cache
def step(*heads):
    return image_texts.accumulated(objective(*heads), trees(*heads), batch(), 1)


@functools.cache
def predicted(*heads):
    """All that can be predicted of the batch."""
    made = objective(*heads)
    names = ("image_embeddings", "text_embeddings", "logits", "encode", "features")

    def run(trees, batch):
        params, _, extras = trees
        found = {name: made.predict[name](params, extras, batch) for name in names}
        for name in ("image", "tokens"):
            alone = made.predict["encode"](params, extras, {name: batch[name]})
            found[name] = alone["tokens"]
            found[f"{name}_alone"] = made.predict["embeddings"](params, extras, {name: batch[name]})
        return found

    return jax.tree.map(np.asarray, jax.jit(run)(trees(*heads), batch()))


def test_info_nce_by_hand():
    """Two pairs at right angles: each picks its own with log(1 + exp(-scale))."""
    images = texts = jnp.eye(2)
    loss, metrics = contrastive.info_nce(images, texts, jnp.log(3.0))
    np.testing.assert_allclose(loss, math.log(1 + math.exp(-3)), rtol=1e-6)
    np.testing.assert_allclose(metrics["temperature"], 1 / 3, rtol=1e-6)
    assert metrics["contrast_accuracy/image_to_text"] == 1
    # All texts alike: images cannot tell them apart, and the texts take the first image.
    texts = jnp.array([[1.0, 0.0], [1.0, 0.0]])
    loss, metrics = contrastive.info_nce(images, texts, jnp.log(3.0))
    right, wrong = math.log(1 + math.exp(-3)), math.log(1 + math.exp(3))
    np.testing.assert_allclose(loss, (math.log(2) + (right + wrong) / 2) / 2, rtol=1e-6)
    assert metrics["contrast_accuracy/text_to_image"] == 0.5


def test_the_loss_is_the_plain_one():
    loss, vectors = step("first")[0]["loss"], predicted("first")
    scale = trees()[0]["heads"]["logit_scale"]["value"]
    images, texts = vectors["image_embeddings"], vectors["text_embeddings"]
    np.testing.assert_allclose(loss, image_texts.info_nce(images, texts, scale), rtol=1e-5)
    np.testing.assert_allclose(vectors["logits"], np.exp(scale) * images @ texts.T, rtol=1e-5)


@pytest.mark.parametrize("pool", contrastive.POOLS)
def test_embeddings_are_projections_of_each_alone(pool):
    found, heads = predicted(pool), trees(pool)[0]["heads"]
    real = np.asarray(batch()["tokens"]) != 1
    for name, head in (("image", "vision_head"), ("tokens", "language_head")):
        x = found[name].astype(np.float64)
        if pool == "first":
            pooled = x[:, 0]
        elif name == "image":  # CLS left out
            pooled = x[:, 1:].reshape(4, 16 * 16) if pool == "patches" else x[:, 1:].mean(1)
        else:
            pooled = np.stack([row[keep].mean(0) for row, keep in zip(x, real, strict=True)])
        vectors = pooled @ heads[head]["kernel"]
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        got = found["image_embeddings" if name == "image" else "text_embeddings"]
        assert got.shape == (4, 8) and got.dtype == np.float32
        np.testing.assert_allclose(got, vectors, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(found[f"{name}_alone"], got, atol=1e-6)


def test_a_text_is_the_sum_of_its_words_vectors():
    found, table = predicted("mean", "words"), trees("mean", "words")[0]["heads"]["word_vectors"]
    tokens = np.asarray(batch()["tokens"])
    rows = np.asarray(table["table"], np.float64)
    vectors = np.stack([rows[row[row != 1]].sum(0) for row in tokens])
    vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    assert found["text_embeddings"].dtype == np.float32
    np.testing.assert_allclose(found["text_embeddings"], vectors, atol=1e-5)
    np.testing.assert_allclose(found["tokens_alone"], vectors, atol=1e-5)
    assert "language_head" not in trees("mean", "words")[0]["heads"]


def test_features_are_the_images():
    found = predicted("first")
    np.testing.assert_allclose(found["features"], found["image"][:, 1:].mean(1), atol=1e-5)
    assert found["encode"]["tokens"].shape == (4, 17 + 10, 16)


def test_texts_padded_longer_have_the_same_embeddings():
    tokens = np.pad(batch()["tokens"], ((0, 0), (0, 6)), constant_values=1)
    embed = jax.jit(objective().predict["text_embeddings"])
    got = embed(trees()[0], {}, {"tokens": tokens})
    np.testing.assert_allclose(got, predicted("first")["text_embeddings"], atol=1e-6)


@pytest.mark.parametrize("pool", contrastive.POOLS)
def test_what_gets_gradients(pool):
    """Everything that a batch is read with: no masks, so no mask token."""
    trunk = {f"trunk/{name}_{part}" for name in ("image", "text") for part in ("blocks", "norm")}
    embed = {"patch", "words", "cls_token", "image_positions", "text_positions"}
    heads = {"heads/vision_head", "heads/language_head", "heads/logit_scale"}
    assert image_texts.moved(step(pool)[1]) == trunk | {f"embed/{x}" for x in embed} | heads


def test_the_encoder_learns_nothing_of_texts_that_are_sums_of_words():
    trunk = {"trunk/image_blocks", "trunk/image_norm"}
    embed = {f"embed/{name}" for name in ("patch", "cls_token", "image_positions")}
    heads = {"heads/vision_head", "heads/word_vectors", "heads/logit_scale"}
    assert image_texts.moved(step("patches", "words")[1]) == trunk | embed | heads


def test_the_temperature_starts_at_7_percent_and_projections_have_no_bias():
    params = jax.jit(objective().init)(jax.random.key(0))[0]["heads"]
    scale = params["logit_scale"]["value"].value
    np.testing.assert_allclose(scale, math.log(1 / 0.07), rtol=1e-6)
    assert scale.shape == () and set(params["vision_head"]) == {"kernel"}


def test_a_pretrained_encoder_fits():
    """All of its encoder is found in checkpoints of the two objectives of pre-training."""
    shapes = jax.tree.map(jnp.shape, trees()[0])
    for name, settings in (("beit3", image_texts.MDM), ("bivl", image_texts.BIVL)):
        made = make_objective(image_texts.config(f"configs/pretrain/{name}.py:smoke", settings))
        theirs = jax.tree.map(jnp.shape, image_texts.created(made)[0])
        assert ema.without(theirs, ("heads",)) == ema.without(shapes, ("heads",))


def test_the_shipped_config_tunes_every_size():
    for size in ("tiny", "base", "large", "giant"):
        c = configs.load(f"configs/finetune/contrastive.py:size={size}")
        assert c.contrast.width == (512 if size == "tiny" else c.model.width)
        assert c.data.kind and c.objective == "contrastive"
    assert c.optimizer.layer_decay == 0.95 and c.model.drop_path == 0.3 and c.batch_size == 16_384


def test_the_shipped_config_keeps_nothing_of_pretraining_but_the_encoder():
    """beit3's fine-tuning code: `optim_factory.py`, `datasets.py`; tiny stays as it was tuned."""
    c = configs.load("configs/finetune/contrastive.py:size=base")
    assert (c.optimizer.end_learning_rate, c.optimizer.weight_decay) == (1e-6, 0.05)
    assert (c.optimizer.beta2, c.optimizer.eps, c.optimizer.clip_norm) == (0.999, 1e-8, 0.0)
    assert c.augment.color_jitter == (0.0, 0.0, 0.0) and c.augment.scale == (0.5, 1.0)
    assert c.augment.flip and c.augment.squash
    decayed = optimizer.decay_mask(trees()[0], c.optimizer.no_decay)["embed"]
    assert decayed["text_positions"]["value"] and decayed["words"]["table"]
    assert not decayed["image_positions"]["value"] and not decayed["cls_token"]["value"]
    c = configs.load("configs/finetune/contrastive.py:size=tiny")
    assert c.optimizer.end_learning_rate == 1e-5 and "squash" not in c.augment


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"contrast__pool": "last"}, "config.contrast.pool='last' is unknown; use one of"),
        ({"contrast__masked": ("words",)}, "config.contrast.masked='words' is unknown; use one of"),
        ({"contrast__width": 0}, "config.contrast.width=0 must be at least 1"),
        ({"contrast__text": "bag"}, "config.contrast.text='bag' is unknown; use one of"),
        (
            {
                "contrast__pool": "patches",
                "contrast__masked": ("image",),
                "masking": image_texts.CLONES,
            },
            "config.contrast.pool='patches' reads all patches; take image out of contrast.masked",
        ),
        (
            {"optimizer__accumulate": 2},
            "config.optimizer.accumulate=2: contrast compares the whole",
        ),
        ({"modality": "text"}, "config.modality='text' is unknown"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        contrastive.make(config(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "given", "field"),
    [("image_embeddings", "tokens", "image"), ("text_embeddings", "image", "text")],
)
def test_a_batch_without_the_modality_is_refused(name, given, field):
    with pytest.raises(UserError, match=f"the batch has no {field}; the data set needs that field"):
        objective().predict[name](trees()[0], {}, {given: batch()[given]})


@pytest.mark.parametrize("text", ["encoder", "words"])
@pytest.mark.parametrize("masked", [("text",), ("image", "text")])
def test_masked_contrast_reads_only_what_is_not_masked(masked, text):
    changes = {"contrast__masked": masked, "contrast__pool": "first", "contrast__text": text}
    made = contrastive.make(config(**changes))
    pairs = image_texts.batch()["pairs"]
    assert set(made.spec) == {"image", "mask", "tokens", "inputs", "text_mask"} <= set(pairs)
    params, _, extras = trees("first", text)
    loss = jax.jit(lambda pairs: made.loss(params, extras, pairs, {}, jax.random.key(0))[0])
    told = pairs | {"tokens": jnp.where(pairs["text_mask"], 5, pairs["tokens"])}
    whole = pairs | {"mask": jnp.zeros_like(pairs["mask"])}
    nowhere = jnp.zeros_like(pairs["text_mask"])
    unmasked = whole | {"inputs": pairs["tokens"], "text_mask": nowhere}
    assert loss(told) == loss(pairs) != loss(unmasked)
    assert (loss(whole) == loss(pairs)) == ("image" not in masked)
    np.testing.assert_allclose(loss(unmasked), step("first", text)[0]["loss"], rtol=1e-5)
