"""ViLT's three losses against plain computations, and whole-word masks."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import image_texts
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.modalities import single_stream
from bivl.objectives import vilt

CONFIG = "configs/pretrain/vilt.py:smoke"
SETTINGS = {
    "image_size": 12,
    "batch_size": 4,
    "tokenizer.kind": "bytes",
    "model.patch_size": 4,
    "model.width": 16,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.mlp_dim": 24,
    "model.text_rows": 10,
    "model.dropout": 0.0,
    "model.activation_dropout": 0.0,
    "pair.length": 10,
    "pair.mask_ratio": 0.4,
}
FILE = "tests/golden/vilt.npz"
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    return image_texts.config(CONFIG, SETTINGS, **changes)


@functools.cache
def objective():
    return vilt.make(config())


@functools.cache
def trees():
    return image_texts.created(objective())


@functools.cache
def batch():
    """Four pairs of one to five masked tokens, three of them padded."""
    rng = np.random.default_rng(3)
    texts = image_texts.texts(rng, 4, 10, image_texts.PADS["pairs"])
    images = rng.integers(0, 256, (4, 12, 12, 3)).astype(np.uint8)
    keep = texts["text_mask"].cumsum(1) <= 4
    texts["text_mask"] &= keep
    return jax.tree.map(jnp.asarray, texts | {"image": images})


@functools.cache
def step(accumulate: int = 1):
    return image_texts.accumulated(objective(), trees(), batch(), accumulate)


@functools.cache
def read(name: str):
    return jax.jit(objective().predict[name])


def plain_words(tokens):
    head = trees()[0]["mlm_head"]
    x = image_texts.gelu(image_texts.linear(tokens, head["dense"]))
    x = image_texts.normalized(x, -1, 1e-6) * head["norm"]["scale"] + head["norm"]["bias"]
    return x @ np.asarray(head["decoder"]["kernel"], np.float64) + head["bias"]["value"]


def test_the_loss_of_words():
    """Of the masked text beside its own image; the head is BERT's."""
    given = batch() | {"tokens": batch()["inputs"], "padding": batch()["tokens"] == 1}
    out = read("encode")(trees()[0], {}, given)
    logits = plain_words(np.asarray(out["tokens"][:, :10]))
    np.testing.assert_allclose(read("logits")(trees()[0], {}, given), logits, atol=1e-4)
    mask = np.asarray(batch()["text_mask"])
    loss, right, _ = image_texts.token_loss(logits, np.asarray(batch()["tokens"]), mask)
    np.testing.assert_allclose(step()[0]["mlm_loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(step()[0]["mlm_accuracy"], right, rtol=1e-5)


def test_micro_batches_have_the_same_loss_of_words():
    np.testing.assert_allclose(step(2)[0]["mlm_loss"], step()[0]["mlm_loss"], rtol=1e-5)


def test_half_of_the_images_are_others_of_the_batch():
    images = jnp.arange(7)
    for seed in range(20):
        found, matched = vilt.shuffled(images, jax.random.key(seed))
        assert matched.sum() == 4 and ((found == images) == matched).all()
    found, matched = vilt.shuffled(images[:1], jax.random.key(0))
    assert found.tolist() == [0] and matched.all()


def test_pairs_are_told_from_others():
    """`matching` on either half, and the transport of words to patches."""
    made, params = objective(), trees()[0]
    keys = jax.random.split(jax.random.key(5))
    metrics = jax.jit(lambda p, b: made.loss(p, {}, b, {}, jax.random.key(5))[1]["metrics"])
    images, matched = vilt.shuffled(batch()["image"], jax.random.split(keys[1])[0])
    given = batch() | {"image": images}
    out, found = read("encode")(params, {}, given), metrics(params, batch())
    logits = image_texts.linear(out["pooled"], params["itm_head"])
    np.testing.assert_allclose(read("matching")(params, {}, given), logits, atol=1e-5)
    each = -image_texts.log_softmax(logits)[np.arange(4), np.asarray(matched, int)]
    np.testing.assert_allclose(found["itm_loss"], each.mean(), rtol=1e-5)
    pooled = np.tanh(image_texts.linear(out["tokens"][:, 0], params["pool"]))
    np.testing.assert_allclose(out["pooled"], pooled, atol=1e-5)

    total, tokens = 0.0, np.asarray(out["tokens"], np.float64)
    unit = tokens / np.linalg.norm(tokens, axis=-1, keepdims=True)
    for row, sign in enumerate(np.where(matched, 1, -1)):
        words = unit[row, 1 : int((~out["padding"][row, :10]).sum()) - 1]
        cost = 1 - words @ unit[row, 11:].T
        total += sign * (cost * plan(cost).T).sum()
    np.testing.assert_allclose(found["wpa_loss"], total / 4, rtol=1e-4, atol=1e-6)


def plan(cost):
    """IPOT for one cost [m, n] -> [n, m]."""
    m, n = cost.shape
    kernel, found, across = np.exp(-cost.T / 0.5), np.ones((n, m)), np.full(m, 1 / m)
    for _ in range(50):
        weighted = kernel * found
        down = 1 / (n * (weighted @ across))
        across = 1 / (m * (weighted.T @ down))
        found = down[:, None] * weighted * across
    return found


def test_transport_is_the_recorded_one():
    with np.load(FILE) as file:
        cost, wanted = file["cost"], file["plan"]
    texts, patches = np.ones((2, 4), bool), np.ones((2, 6), bool)
    texts[1, 3:], patches[1, 5:] = False, False
    got = np.asarray(jax.jit(vilt.transport)(cost, texts, patches))
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    np.testing.assert_allclose(got[0].sum(0), 1 / 4, atol=1e-5)
    nothing = np.asarray(vilt.transport(cost, np.zeros((2, 4), bool), patches))
    assert not nothing.any()


def test_the_words_of_a_text_lie_between_its_ends():
    padding = np.array([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 1]], bool)
    wanted = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(vilt.inner(jnp.asarray(padding)), np.array(wanted, bool))


def test_everything_gets_gradients():
    params = jax.tree_util.tree_flatten_with_path(trees()[0])[0]
    names = {"/".join(key.key for key in path[:2]) for path, _ in params}
    assert image_texts.moved(step()[1]) == names


@pytest.mark.parametrize(
    ("losses", "heads"),
    [
        ({"itm": 0.0, "wpa": 0.0}, {"mlm_head"}),
        ({"mlm": 0.0}, {"itm_head"}),
        ({"mlm": 0.0, "itm": 0.0}, set()),
    ],
)
def test_a_loss_that_weighs_nothing_is_not_there(losses, heads):
    made = vilt.make(config(**{f"loss_weights__{k}": v for k, v in losses.items()}))
    params = jax.eval_shape(lambda: made.init(jax.random.key(0))[0])
    assert {name for name in params if name.endswith("head")} == heads
    shapes = image_texts.created(made)[0]
    metrics = jax.eval_shape(
        lambda p, b: made.loss(p, {}, b, {}, jax.random.key(0))[1], shapes, batch()
    )
    seen = {name.split("_")[0] for name in metrics["metrics"]}
    assert seen == {"mlm", "itm", "wpa"} - losses.keys()


def test_without_losses_it_is_read_but_not_trained():
    off = {f"loss_weights__{name}": 0.0 for name in vilt.LOSSES}
    made = vilt.make(config(model__pooler=False, **off))
    assert set(made.predict) == {"features", "encode", "attention"}
    with pytest.raises(UserError, match="config.loss_weights of mlm, itm, wpa are all 0; raise"):
        made.examples([])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss_weights__mpp": 1.0}, "config.loss_weights='mpp' is unknown"),
        ({"pair__length": 11}, "config.pair.length=11 must lie between 4 and model.text_rows=10"),
        ({"pair__mask_ratio": 0.0}, "config.pair.mask_ratio=0.0 must lie between"),
        ({"pair__masking__kind": "block"}, "config.pair.masking.kind='block' is unknown"),
        ({"model__vocabulary": 9}, "config.model.vocabulary=9 is smaller than the tok"),
        ({"model__patch_size": 5}, "config.image_size=12 is not a multiple of"),
        ({"model__attention": "cudnn", "dtype": "bfloat16"}, "takes a text's pads to stand last"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words) as caught:
        vilt.make(config(**changes))
    assert "\n" not in str(caught.value)


def test_the_shipped_config_has_the_published_sizes():
    """111.6 M parameters without heads: ViT-B/32, the words' table and the rest of BERT's."""
    c = configs.load("configs/pretrain/vilt.py")
    with c.unlocked():
        c.tokenizer.kind, c.model.vocabulary = "bytes", 30_522
        c.loss_weights.update(mlm=0.0, itm=0.0, wpa=0.0)
    shapes = jax.eval_shape(vilt.make(c).init, jax.random.key(0))[0]
    width, blocks = 768, 12 * (12 * 768**2 + 13 * 768)
    tables = 30_522 + 40 + 2 + 2 + 145 + 1  # words, positions, segments, modalities, CLS
    wanted = blocks + (tables + 3 * 32**2 + 1 + 2 + 2 + width + 1) * width
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == wanted


# Whole words


def vocabulary(folder):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "c", "##d", "e"]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    return {"tokenizer.kind": "wordpiece", "tokenizer.path": str(folder)}


def test_words_are_masked_as_a_whole(tmp_path):
    """At most the share of tokens, at least one; never the ends; 80, 10 and 10 of a hundred."""
    changes = {key.replace(".", "__"): x for key, x in vocabulary(tmp_path).items()}
    c = config(**changes, pair__length=10, pair__mask_ratio=0.3)
    ops, rng = single_stream.train_ops(c), np.random.default_rng(0)
    record = {"image": np.zeros((12, 12, 3), np.uint8), "text": "abb c cd ab"}
    words, count = [{1, 2, 3}, {4}, {5, 6}, {7, 8}], np.zeros(10)
    fates = np.zeros(3)
    for _ in range(600):
        made = ops(record, rng)
        assert made["tokens"].tolist() == [2, 5, 6, 6, 7, 7, 8, 5, 6, 3]
        chosen = set(np.flatnonzero(made["text_mask"]))
        assert 1 <= len(chosen) <= 3 and all(not chosen & w or w <= chosen for w in words)
        count += made["text_mask"]
        inputs, tokens = made["inputs"][list(chosen)], made["tokens"][list(chosen)]
        fates += (inputs == 4).sum(), (inputs == tokens).sum(), len(inputs)
        others = inputs[(inputs != 4) & (inputs != tokens)]
        assert (others >= 5).all() and (made["inputs"] == made["tokens"])[~made["text_mask"]].all()
    assert (count[1:9] > 50).all() and not count[[0, 9]].any()
    np.testing.assert_allclose(fates[:2] / fates[2], [0.8, 0.12], atol=0.04)
    short = ops(record | {"text": "e"}, rng)
    assert short["text_mask"].tolist() == [False, True] + [False] * 8
    assert not ops(record | {"text": ""}, rng)["text_mask"].any()


def test_other_tokenizers_have_words_of_one_token():
    ops = single_stream.train_ops(config())
    made = ops(
        {"image": np.zeros((20, 30, 3), np.uint8), "text": "abcdefgh"}, np.random.default_rng(0)
    )
    assert made["text_mask"].sum() == 4 and made["image"].shape == (12, 12, 3)
    assert made["inputs"].dtype == made["tokens"].dtype == np.int32


def test_pairs_are_prepared():
    c = config()
    record = {"image": np.zeros((20, 30, 3), np.uint8), "text": "ab", "label": 3, "id": 5}
    example = single_stream.eval_ops(c)(record)
    assert set(example) == {"image", "tokens", "label", "id"} and example["label"] == 3
    assert example["tokens"].tolist() == [0, 101, 102, 2] + [1] * 6
    found = single_stream.preprocess(c)(image=[record["image"]] * 2, text=["ab", "abc"])
    assert found["tokens"].shape == (2, 5) and found["image"].shape == (2, 12, 12, 3)
    assert found["padding"].tolist() == [[False] * 4 + [True], [False] * 5]
    with pytest.raises(UserError, match="reads a text and its image together; pass image="):
        single_stream.preprocess(c)(image=[record["image"]], text=["a", "b"])
