"""CLIP's training against plain computations, and what one tower alone can be asked."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import image_texts
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.modalities import towers
from bivl.models.towers import capped
from bivl.objectives import contrastive, vqkd
from visual_tokens import small_vqkd

CONFIG = "configs/pretrain/clip.py:smoke"
SETTINGS = {
    "image_size": 16,
    "batch_size": 4,
    "tokenizer.kind": "bytes",
    "model.patch_size": 4,
    "model.width": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_dim": 24,
    "model.text.width": 12,
    "model.text.depth": 1,
    "model.text.num_heads": 3,
    "model.text.mlp_dim": 20,
    "model.text.rows": 10,
    "pair.length": 10,
    "contrast.width": 8,
}
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    return image_texts.config(CONFIG, SETTINGS, **changes)


@functools.cache
def objective():
    return contrastive.make(config())


@functools.cache
def trees():
    return image_texts.created(objective())


def batch():
    """Four pairs, whose texts end in 2 and have pads behind."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 260, (4, 10)).astype(np.int32)
    for row, end in enumerate((9, 3, 6, 1)):
        tokens[row, end], tokens[row, end + 1 :] = 2, 1
    tokens[:, 0] = 0
    images = rng.integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    return {"image": jnp.asarray(images), "tokens": jnp.asarray(tokens)}


@functools.cache
def step():
    return image_texts.accumulated(objective(), trees(), batch(), 1)


@functools.cache
def predicted():
    made = objective()

    def run(trees, batch):
        params, _, extras = trees
        names = ("image_embeddings", "text_embeddings", "logits", "features", "attention")
        found = {name: made.predict[name](params, extras, batch) for name in names}
        for name in ("image", "tokens"):
            found[name] = made.predict["encode"](params, extras, {name: batch[name]})
        return found

    return jax.tree.map(np.asarray, jax.jit(run)(trees(), batch()))


def test_the_loss_is_the_plain_one():
    loss, found = step()[0]["loss"], predicted()
    scale = trees()[0]["heads"]["logit_scale"]["value"]
    images, texts = found["image_embeddings"], found["text_embeddings"]
    np.testing.assert_allclose(loss, image_texts.info_nce(images, texts, scale), rtol=1e-5)
    np.testing.assert_allclose(found["logits"], np.exp(scale) * images @ texts.T, rtol=1e-5)


def test_vectors_are_projections_of_the_class_token_and_of_the_end():
    found, heads = predicted(), trees()[0]["heads"]
    ends = np.array([9, 3, 6, 1])
    pooled = {
        "image": found["image"]["tokens"][:, 0],
        "text": found["tokens"]["tokens"][np.arange(4), ends],
    }
    for name, field, head in (
        ("image", "image", "vision_head"),
        ("text", "tokens", "language_head"),
    ):
        np.testing.assert_allclose(found[field]["pooled"], pooled[name], atol=1e-6)
        vectors = pooled[name].astype(np.float64) @ heads[head]["kernel"]
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
        np.testing.assert_allclose(found[f"{name}_embeddings"], vectors, atol=1e-5)
    np.testing.assert_allclose(found["features"], pooled["image"], atol=2e-6)
    assert found["attention"].shape == (4, 2, 4, 4)
    assert found["image"]["tokens"].shape == (4, 17, 16)
    assert found["tokens"]["tokens"].shape == (4, 10, 12)


def test_what_stands_behind_the_end_is_not_read():
    given = batch()
    other = jnp.where(given["tokens"] == 1, 77, given["tokens"])
    for tokens in (other, jnp.pad(given["tokens"][1:2, :5], ((0, 3), (0, 0)), mode="edge")):
        got = jax.jit(objective().predict["text_embeddings"])(trees()[0], {}, {"tokens": tokens})
        rows = slice(None) if tokens.shape[1] == 10 else [1] * 4
        np.testing.assert_allclose(got, predicted()["text_embeddings"][rows], atol=1e-6)


def test_everything_gets_gradients():
    params = jax.tree_util.tree_flatten_with_path(trees()[0])[0]
    names = {"/".join(key.key for key in path[:2]) for path, _ in params}
    assert image_texts.moved(step()[1]) == names


def test_the_scale_comes_back_from_above():
    grad = jax.grad(lambda x, sign: sign * capped(x, 2.0))
    assert capped(3.0, 2.0) == 2 and capped(1.0, 2.0) == 1
    assert [grad(x, sign) for x, sign in ((1.0, 1.0), (1.0, -1.0))] == [1, -1]
    assert [grad(x, sign) for x, sign in ((3.0, 1.0), (3.0, -1.0))] == [1, 0]


def test_the_scale_is_held_to_100():
    params, _, extras = trees()
    heads = params["heads"] | {"logit_scale": {"value": jnp.float32(9.0)}}
    metrics = jax.jit(
        lambda p: objective().loss(p, extras, batch(), {}, jax.random.key(0))[1]["metrics"]
    )(params | {"heads": heads})
    np.testing.assert_allclose(metrics["temperature"], 0.01, rtol=1e-5)


def test_the_shipped_config_has_the_published_sizes():
    params = {"base": 149_620_737, "large": 427_616_513}  # openai/CLIP's ViT-B/16 and ViT-L/14
    for size in ("tiny", "small", "base", "large"):
        c = configs.load(f"configs/pretrain/clip.py:size={size}")
        if size == "tiny":
            continue
        with c.unlocked():
            c.tokenizer.kind, c.model.text.vocabulary = "bytes", 49_408
        shapes = jax.eval_shape(contrastive.make(c).init, jax.random.key(0))[0]
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
        assert count == params.get(size, count)
    assert c.optimizer.learning_rate == 4e-4 and c.steps == 390_625


def test_one_tower_is_read_but_not_trained():
    made = contrastive.make(config(model__towers=("text",)))
    assert set(made.spec) == {"tokens"} and "logits" not in made.predict
    with pytest.raises(UserError, match=r"config.model.towers=\('text',\), contrast.width=8: con"):
        made.examples([])
    params = image_texts.created(made)[0]
    assert not {name for name in params if name.startswith("image")}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__towers": ("sound",)}, "config.model.towers='sound' is unknown"),
        ({"model__text__pool": "last"}, "config.model.text.pool='last' is unknown"),
        ({"pair__length": 11}, "config.pair.length=11 must lie between 3 and model.text.rows=10"),
        ({"model__text__vocabulary": 9}, "config.model.text.vocabulary=9 is smaller than the tok"),
        ({"optimizer__accumulate": 2}, "config.optimizer.accumulate=2: contrast compares the whol"),
        ({"optimizer__layer_decay": 0.9}, "config.optimizer.layer_decay is for models with one"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        contrastive.make(config(**changes))
    assert "\n" not in str(caught.value)


def test_two_modalities_are_two_calls():
    with pytest.raises(UserError, match="two towers encode one modality a call"):
        objective().predict["encode"](trees()[0], {}, batch())
    with pytest.raises(UserError, match="the batch has no text"):
        objective().predict["text_embeddings"](trees()[0], {}, {"image": batch()["image"]})


def test_texts_and_images_are_prepared():
    c = config()
    ops = towers.preprocess(c)
    found = ops(text=["ab", "a much longer text"], image=[np.zeros((20, 30, 3), np.uint8)])
    assert found["tokens"].shape == (2, 10) and found["image"].shape == (1, 16, 16, 3)
    assert found["tokens"][0, :4].tolist() == [0, 101, 102, 2] and found["tokens"][1, 9] == 2
    assert found["padding"].tolist() == [[False] * 4 + [True] * 6, [False] * 10]
    record = {"image": np.zeros((20, 30, 3), np.uint8), "text": "ab", "label": 3, "id": 5}
    example = towers.eval_ops(c)(record)
    assert set(example) == {"image", "tokens", "label", "id"} and example["label"] == 3
    assert example["tokens"].tolist()[:4] == [0, 101, 102, 2]
    with pytest.raises(UserError, match="preprocess got nothing"):
        ops()
    with pytest.raises(UserError, match="wants text="):
        ops(text="ab")


def test_it_teaches_a_tokenizer_the_projections_of_its_patches():
    c = small_vqkd()
    teacher = config(image_size=16, model__patch_size=4)
    with c.unlocked():
        c.teacher.config = configs.from_dict(teacher.to_dict())
    made = vqkd.make(c)
    params, held, extras = image_texts.created(made)
    images = batch()["image"]
    target = made.targets(params, held, extras, {"image": images}, None)
    theirs = objective().predict["patch_features"](held["teacher"]["params"], {}, {"image": images})
    assert target.shape == (4, 16, 8)
    np.testing.assert_allclose(target, theirs, atol=1e-6)
