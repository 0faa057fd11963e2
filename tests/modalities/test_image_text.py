"""Images, texts and pairs: what the host makes of records, and their embedding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.modalities import image_text, text

SIZES = {"images": 2, "texts": 3, "pairs": 4}
MASK, BOS, PAD, EOS = 260, 0, 1, 2  # of the tokenizer `bytes`
CLONES = {"kind": "inverse_block", "num_masks": 3, "block": 2, "adjust": 0.1}
pytestmark = pytest.mark.usefixtures("quick_compile")


def config(**changes):
    """The smoke config on 16 px images in 4x4 patches; `changes`: keys with `__` for the dots."""
    c = configs.load("configs/pretrain/beit3.py:smoke")
    with c.unlocked():
        c.image_size, c.tokenizer.kind = 16, "bytes"
        c.model.update({"patch_size": 4, "width": 8, "text_rows": 20, "vocabulary": 264})
        c.text.length, c.pair.length, c.masking.min_block = 12, 10, 2
        for name, value in changes.items():
            *groups, last = name.split("__")
            functools.reduce(lambda node, key: node[key], groups, c)[last] = value
    return c


def clones(**changes):
    return config(masking=CLONES, mask_ratio=0.5, **changes)


def record(words="a cat sat"):
    pixels = np.random.default_rng(len(words)).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    return {"image": pixels, "text": words, "id": 7, "label": 2}


def example(c, part, seed=0, words="a cat sat"):
    rng = np.random.default_rng(seed)
    given = record(words)
    if part == "texts":
        ids = text.record_ids(tokenizers.load(c.tokenizer), given, c.text.length)
        given = {"tokens": ids}
    return image_text.train_ops(c)[part](given, rng)


# The host


@pytest.mark.parametrize("make", [config, clones])
def test_the_spec_is_what_the_ops_give(make):
    c = make()
    spec = image_text.spec(c, SIZES)
    assert list(spec) == list(SIZES)
    for part, shapes in spec.items():
        made = example(c, part)
        assert made.keys() == shapes.keys()
        for name, shape in shapes.items():
            assert shape.shape == (SIZES[part], *made[name].shape), (part, name)
            assert shape.dtype == made[name].dtype, (part, name)
    assert set(spec["pairs"]) == set(spec["images"]) | set(spec["texts"])
    assert ("keep" in spec["pairs"]) == (make is clones)


def test_the_spec_has_the_parts_asked_for():
    assert set(image_text.spec(config(), {"texts": 5})) == {"texts"}
    with pytest.raises(UserError, match="config.data.sounds is unknown; the parts are images, "):
        image_text.spec(config(), {"sounds": 2})


def test_texts_are_padded_and_cut():
    made = example(config(), "pairs", words="ab")
    np.testing.assert_array_equal(made["tokens"], [BOS, 101, 102, EOS, *[PAD] * 6])
    assert (made["inputs"][4:] == PAD).all() and not made["text_mask"][4:].any()
    made = example(config(), "pairs", words="a" * 30)
    assert made["tokens"].shape == (10,) and made["tokens"][-1] == EOS
    made = image_text.eval_ops(config())(record())
    assert made["image"].shape == (16, 16, 3) and made["image"].dtype == np.uint8
    np.testing.assert_array_equal(made["tokens"][:3], [BOS, 101, 36])
    assert made["id"] == 7 and made["label"] == 2
    assert set(image_text.eval_ops(config())({"text": "x"})) == {"tokens"}
    assert set(image_text.eval_ops(config())({"image": record()["image"]})) == {"image"}


@pytest.mark.parametrize(("n", "ratio"), [(2, 0.15), (5, 0.15), (9, 0.5), (11, 0.5), (9, 0.95)])
def test_how_many_tokens_are_masked(n, ratio):
    """clip(round(ratio n), 1, n - 1), never the first."""
    sample = sampler(ratio)
    wanted = min(max(round(ratio * n), 1), n - 1)
    hit = np.zeros(n, int)
    for seed in range(200):
        mask = sample(np.random.default_rng(seed), np.arange(n, dtype=np.int32) + 4)["mask"]
        assert mask.sum() == wanted and not mask[0] and not mask[n:].any()
        hit += mask[:n]
    spread = 6 * (200 * wanted / (n - 1)) ** 0.5
    np.testing.assert_allclose(hit[1:], 200 * wanted / (n - 1), atol=spread)


def sampler(ratio, **masking):
    """The text masks of pairs of 12 tokens."""
    changes = {f"pair__masking__{name}": value for name, value in masking.items()}
    c = config(pair__mask_ratio=ratio, pair__length=12, **changes)
    return text.mask_sampler(image_text._texts(c, "pair"))


def test_what_masked_tokens_become():
    """80 % the mask token, 10 % another one, which is never <s>, <pad> or </s>, 10 % themselves."""
    sample, ids = sampler(0.5), np.full(12, 77, np.int32)
    rng, seen = np.random.default_rng(0), []
    for _ in range(2000):
        made = sample(rng, ids)
        assert (made["inputs"][~made["mask"]] == 77).all()
        seen.append(made["inputs"][made["mask"]])
    seen = np.concatenate(seen)
    other = seen[(seen != MASK) & (seen != 77)]
    shares = [(seen == MASK).mean(), (seen == 77).mean(), len(other) / len(seen)]
    np.testing.assert_allclose(shares, [0.8, 0.1, 0.1], atol=0.015)  # 5 errors, and 2 of 258 ids
    assert not np.isin(other, [BOS, PAD, EOS]).any()
    assert other.min() == 3 and len(np.unique(other)) > 230


def test_shares_of_corruption_are_settings():
    made = sampler(0.5, kept=0.0, randomized=0.0)(np.random.default_rng(0), np.full(12, 77))
    assert (made["inputs"][made["mask"]] == MASK).all()
    made = sampler(0.5, kept=1.0, randomized=0.0)(np.random.default_rng(0), np.full(12, 77))
    assert made["mask"].sum() == 6 and (made["inputs"] == 77).all()


@pytest.mark.parametrize("kind", ["beit3", "bert", "span"])
@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
def test_no_more_tokens_are_masked_than_the_bound(kind, ratio):
    settings = {"kind": kind}
    settings |= {"beit3": {"kept": 0.1, "randomized": 0.1}, "span": {"span": 3}}.get(kind, {})
    if kind == "bert":
        settings |= {"kept": 0.1, "randomized": 0.1, "score": "all"}
    c = config(pair__mask_ratio=ratio, pair__masking=settings)
    sample = text.mask_sampler(image_text._texts(c, "pair"))
    most = max(
        sample(np.random.default_rng(seed), np.full(10, 77))["mask"].sum() for seed in range(200)
    )
    assert 1 <= most <= image_text.most_masked(c.pair) <= 10


@pytest.mark.parametrize(
    ("corrupt", "image", "words"),
    [("both", 1, 1), ("image", 1, 0), ("text", 0, 1), ("either", 0.5, 0.5)],
)
def test_which_of_a_pair_is_masked(corrupt, image, words):
    c = config(pair__corrupt=corrupt)
    ops = image_text.train_ops(c)["pairs"]
    made = [ops(record(), np.random.default_rng(seed)) for seed in range(60)]
    masked = np.array([[x["mask"].any(), x["text_mask"].any()] for x in made])
    np.testing.assert_allclose(masked.mean(0), [image, words], atol=0.25 * (corrupt == "either"))
    assert masked.any(1).all()
    for x in made:
        changed = x["inputs"] != x["tokens"]
        assert not (changed & ~x["text_mask"]).any()


def test_pairs_have_crops_and_texts_of_their_own():
    """config.pair.scale and length; with the whole image there is nothing to draw but the flip."""
    c = config(pair__scale=(1.0, 1.0), augment__ratio=(1.2, 1.2), augment__flip=False)
    crops = {part: {example(c, part, seed)["image"].tobytes() for seed in range(6)} for part in
             ("images", "pairs")}  # fmt: skip
    assert len(crops["pairs"]) == 1 and len(crops["images"]) > 3
    assert example(c, "pairs")["tokens"].shape == (10,)
    assert example(c, "texts")["tokens"].shape == (12,)


def test_pairs_for_tuning_are_unmasked():
    made = image_text.pair_ops(config())(record("ab"), np.random.default_rng(0))
    assert set(made) == {"image", "tokens"} and made["image"].shape == (16, 16, 3)
    np.testing.assert_array_equal(made["tokens"], [BOS, 101, 102, EOS, *[PAD] * 6])


def test_preprocessing_takes_either_or_both():
    ops, pictures = image_text.preprocess(config()), [record()["image"]] * 2
    both = ops(image=pictures, text=["a", "a longer text of many words"])
    assert both["image"].shape == (2, 16, 16, 3) and both["image"].dtype == np.float32
    assert both["tokens"].shape == both["padding"].shape == (2, 18)  # what the positions allow
    assert set(ops(image=pictures)) == {"image"} and set(ops(text=["a"])) == {"tokens", "padding"}
    with pytest.raises(UserError, match="preprocess got nothing"):
        ops()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pair__length": 19}, "config.pair.length=19 must lie between 4 and 18; model.text_rows"),
        ({"text__length": 3}, "config.text.length=3 must lie between 4 and 18"),
        ({"pair__masking__kind": "random"}, "config.pair.masking.kind='random' is unknown"),
        ({"text__masking": {"kind": "span"}}, "config.text.masking={'kind': 'span'}: .* missing"),
        ({"text__mask_ratio": 0.0}, "config.text.mask_ratio=0.0 must lie between 0 and 1"),
        ({"pair__corrupt": "none"}, "config.pair.corrupt='none' is unknown"),
        ({"pair__corrupt": "text", "masking": CLONES}, "pair.corrupt='text' needs masking.kind="),
        ({"model__vocabulary": 200}, "config.model.vocabulary=200 is smaller than the tokenizer's"),
        ({"pair__mask_ratio": 1.5}, "config.pair.mask_ratio=1.5 must lie between 0 and 1"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    c = config(**changes)
    with pytest.raises(UserError, match=words) as caught:
        image_text.spec(c, SIZES)
        image_text.train_ops(c)
        image_text.make_embed(c, "float32")
    assert "\n" not in str(caught.value)


# The embedding


@functools.cache
def parameters():
    """Random ones; the same for masked patches with and without a token."""
    made = image_text.make_embed(config(), "float32")
    batch = {"image": jnp.zeros((1, 16, 16, 3)), "tokens": jnp.zeros((1, 4), jnp.int32)}
    shapes = nn.unbox(jax.eval_shape(made.init, jax.random.key(0), batch)["params"])
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


def embed(batch, masked=False, c=None):
    """The Tokens of a batch, their numbers of tokens left out."""
    made = image_text.make_embed(c or config(), "float32")

    def run(params, batch):
        return made.apply({"params": params}, batch, masked)._replace(special=0, images=0)

    return jax.jit(run)(parameters(), batch)


def batch():
    rng = np.random.default_rng(3)
    tokens = rng.integers(4, 260, (2, 6)).astype(np.int32)
    tokens[:, 0], tokens[1, 4:] = BOS, PAD
    return {
        "image": rng.standard_normal((2, 16, 16, 3)).astype(np.float32),
        "mask": rng.random((2, 16)) < 0.5,
        "tokens": tokens,
        "inputs": np.where((rng.random((2, 6)) < 0.4) & (tokens != PAD), MASK, tokens),
    }


def plain(given, masked=False):
    """The same in numpy: [B, 17, D] of images and [B, T, D] of texts, before pads are zeroed."""
    p, images = parameters(), given["image"]
    kernel = p["patch"]["projection"]["kernel"]
    patches = images.reshape(len(images), 4, 4, 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
    x = np.einsum("bnijc,ijcd->bnd", patches.reshape(-1, 16, 4, 4, 3), kernel)
    x = x + p["patch"]["projection"]["bias"]
    if masked:
        x = np.where(given["mask"][..., None], p["mask_token"]["value"], x)
    first = np.broadcast_to(p["cls_token"]["value"], (len(x), 1, 8))
    x = np.concatenate([first, x], 1) + p["image_positions"]["value"][2:19]
    ids = given["inputs" if masked else "tokens"]
    return x, p["words"]["table"][ids] + p["text_positions"]["value"][2 : 2 + ids.shape[1]]


@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_patches_words_and_positions_from_row_2(masked):
    given = batch()
    got = embed(given, masked)
    images, words = plain(given, masked)
    words[1, 4:] = 0
    np.testing.assert_allclose(got.x, np.concatenate([images, words], 1), atol=2e-5)
    padding = np.concatenate(
        [np.zeros((2, 17), bool), given["inputs" if masked else "tokens"] == PAD], 1
    )
    np.testing.assert_array_equal(got.padding, padding)
    assert parameters()["image_positions"]["value"].shape == (19, 8)
    assert parameters()["words"]["table"].shape == (264, 8)


def test_parts_alone_are_embedded_as_in_a_pair():
    given = batch()
    both = embed(given)
    image = embed({"image": given["image"]})
    words = embed({"tokens": given["tokens"]})
    np.testing.assert_allclose(np.concatenate([image.x, words.x], 1), both.x, atol=1e-6)
    assert image.padding is None and words.padding.shape == (2, 6)


def test_the_layout_says_where_the_image_is():
    made, given = image_text.make_embed(config(), "float32"), batch()
    found = {}
    for names in (("image",), ("tokens",), ("image", "tokens")):
        only = {name: given[name] for name in names}
        out = made.apply({"params": parameters()}, only)
        found[names[-1], len(names)] = (out.special, out.images)
    assert found == {("image", 1): (1, 17), ("tokens", 1): (0, 0), ("tokens", 2): (1, 17)}


def test_clones_lack_masked_patches_and_repeat_the_text():
    c, given = clones(), batch()
    keep = np.array([[[0, 5, 9], [1, 2, 3]], [[4, 6, 15], [7, 8, 10]]], np.int32)
    given |= {"keep": keep, "mask": np.ones((2, 2, 16), bool)}
    got = embed(given, True, c)
    images, _ = plain(given)
    _, words = plain(given | {"mask": batch()["mask"]}, True)
    words[given["inputs"] == PAD] = 0
    assert got.x.shape == (4, 1 + 3 + 6, 8)
    for row in range(4):
        i, clone = divmod(row, 2)
        np.testing.assert_allclose(got.x[row, 0], images[i, 0], atol=2e-5)
        np.testing.assert_allclose(got.x[row, 1:4], images[i, 1 + keep[i, clone]], atol=2e-5)
        np.testing.assert_allclose(got.x[row, 4:], words[i], atol=2e-5)
        np.testing.assert_array_equal(got.padding[row, 4:], given["inputs"][i] == PAD)


def test_padding_more_changes_nothing():
    given = {"tokens": batch()["tokens"]}
    longer = {"tokens": np.pad(given["tokens"], ((0, 0), (0, 5)), constant_values=PAD)}
    short, long = embed(given), embed(longer)
    np.testing.assert_array_equal(long.x[:, :6], short.x)
    assert not np.asarray(long.x[:, 6:]).any() and long.padding[:, 6:].all()


def test_images_are_normalised_on_the_device():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    ready = (pixels / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    raw, done = embed({"image": pixels}), embed({"image": ready})
    np.testing.assert_allclose(raw.x, done.x, atol=1e-5)
