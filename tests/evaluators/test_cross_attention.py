"""Words find their tokens, and attention that is known is where the picture shows it."""

import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core import sharding
from bivl.core.errors import UserError
from bivl.data import tokenizers
from bivl.evaluators import cross_attention, features, pictures
from bivl.modalities.text import encode_pair, padded

LENGTH = 16  # of a record's tokens
TEXTS = ("a red  kite, above", "Ωmega", "two  dogs\n", "supercalifragilistic expialidocious")


def encode(kind, texts, length):
    tokenizer = tokenizers.load({"kind": kind})
    rows = [encode_pair(tokenizer, text, None, length) for text in texts]
    return np.stack([padded(row, length, tokenizer.pad) for row in rows])


def splits_of(texts, kind="small_xlmr", batch_size=5):
    """A test split of images that differ in brightness, with a tokenizer's tokens."""
    tokens = encode(kind, texts, LENGTH)

    def whole(split):
        yield {"tokens": jnp.asarray(tokens), "mask": np.ones(len(texts), bool)} | {
            "id": np.arange(len(texts))
        }

    def given(strings):
        rows = encode(kind, strings, 40)
        for start in range(0, len(rows), batch_size):
            index = np.arange(start, start + batch_size)
            kept = rows[np.minimum(index, len(rows) - 1)]
            yield {"tokens": jnp.asarray(kept), "id": index, "mask": index < len(rows)}

    def record(split, row):
        image = np.full((12, 12, 3), 20 * row, np.uint8)
        return {"text": texts[row], "image": image, "tokens": tokens[row]}

    return features.Splits(whole, None, texts=given, record=record)


def pointing(params, extras, batch):
    """Token t looks at patch t of 4 x 4 alone; both of its heads agree, the second less firmly."""
    one = jnp.eye(LENGTH).reshape(LENGTH, 4, 4) * jnp.array([1.0, 0.5])[:, None, None, None]
    return jnp.broadcast_to(one, (len(batch["image"]), *one.shape)) * params


PREDICT = {
    "cross_attention": pointing,
    "text_embeddings": lambda params, extras, batch: batch["tokens"] * 1.0,
}


def pairs_of(splits, count=8, limit=6):
    rows = cross_attention._spread(np.arange(len(TEXTS)), count)
    return cross_attention._pairs(PREDICT, splits, rows, limit, jnp.float32(1), {})


@pytest.mark.parametrize("kind", ["small_xlmr", "small", "bytes"])
def test_words_are_the_tokens_that_decode_to_them(kind):
    splits, tokenizer = splits_of(TEXTS, kind), tokenizers.load({"kind": kind})
    for text, pair in zip(TEXTS, pairs_of(splits), strict=True):
        tokens = encode(kind, [text], LENGTH)[0]
        for word, heat in zip(pair.words, pair.maps, strict=True):
            places = np.flatnonzero(heat)
            found = tokenizer.decode(tokens[places]).strip()
            cut = places[-1] == LENGTH - 2  # at the end of the record
            assert found and (word.startswith(found) if cut else found == word)
            assert not set(tokens[places]) & {tokenizer.bos, tokenizer.eos, tokenizer.pad}
            np.testing.assert_allclose(heat.sum(), 0.75, rtol=1e-6)  # a mean over tokens and heads
        if kind != "bytes":
            assert pair.words == tuple(text.split())


def test_what_is_cut_off_has_no_words():
    pair = pairs_of(splits_of(TEXTS, "bytes"))[3]
    assert pair.words == ("supercalifragilistic",)
    assert np.flatnonzero(pair.maps[0]).tolist() == list(range(1, LENGTH - 1))


def test_rows_are_spread_and_words_limited():
    rows = np.array([0, 2, 3, 5, 8, 9])
    assert cross_attention._spread(rows, 2).tolist() == [2, 8]
    assert cross_attention._spread(rows, 9).tolist() == rows.tolist()
    first, second = pairs_of(splits_of(("one", "two", "a b c d", "three")), 2, 3)
    assert first.words == ("two",) and second.words == ("three",)
    np.testing.assert_allclose(second.image * 255, 60, rtol=1e-5)
    assert [len(pair.words) for pair in pairs_of(splits_of(("a b c d",) * 4), 8, 3)] == [3] * 4


def test_few_pairs_lie_on_many_devices():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    like = sharding.to_global({"x": np.zeros((8, 5))}, mesh, 8)["x"]
    values = np.arange(18).reshape(6, 3)
    placed = cross_attention._placed(values, like)
    np.testing.assert_array_equal(placed, values[[0, 1, 2, 3, 4, 5, 5, 5]])
    assert placed.sharding == like.sharding


def test_the_patch_that_is_looked_at_is_bright():
    images = np.full((2, 8, 8, 3), 0.5)
    maps = np.zeros((2, 4, 4))
    maps[0, 1, 2], maps[1, 3, 0] = 0.4, 0.2
    seen = pictures.overlay(images, maps, maps.max())
    light = seen.sum(axis=-1)
    assert (light[0, 2:4, 4:6] > 1.2 * light[0, 0, 0]).all()
    assert light[0].max() == light[0, 2, 4] and light[1].max() == light[1, 6, 0]
    assert light[0, 2, 4] > light[1, 6, 0] + 0.1  # one scale
    apart = pictures.signed_overlay(images, maps - maps.mean(axis=0), 0.2)
    assert apart[0, 2, 4, 0] > apart[0, 2, 4, 2] + 0.3  # red
    assert apart[1, 2, 4, 2] > apart[1, 2, 4, 0] + 0.3  # blue
    assert np.ptp(apart[0, 0, 0]) == 0  # plain


def test_both_pictures_are_drawn():
    splits = splits_of(TEXTS)
    run = cross_attention.make(PREDICT, splits, {"num_pairs": 3, "num_words": 2})
    found = run(jnp.float32(1), {})
    assert set(found) == {"pictures/words", "pictures/words_apart"}
    assert all(x.dtype == np.uint8 and x.shape[2] == 3 and x.std() > 5 for x in found.values())
    assert found["pictures/words"].shape == found["pictures/words_apart"].shape


def test_texts_of_nothing_and_of_anything_are_drawn():
    texts = ("", " ", "$5 $\\broken{", "one")
    for text in texts:
        splits = splits_of((text,) * 2)
        found = cross_attention.make(PREDICT, splits)(jnp.float32(1), {})
        assert found["pictures/words"].ndim == 3


def test_what_has_no_words_and_patches_is_refused():
    splits = splits_of(TEXTS)
    for name in PREDICT:
        others = {key: value for key, value in PREDICT.items() if key != name}
        with pytest.raises(UserError, match=f"no '{name}'; take cross_attention out of config"):
            cross_attention.make(others, splits)
    bare = features.Splits(splits.batches, None)
    with pytest.raises(UserError, match="needs images with texts; take it out of config.evalua"):
        cross_attention.make(PREDICT, bare)
    with pytest.raises(UserError, match="config.eval.cross_attention.num_words is 0; give a posi"):
        cross_attention.make(PREDICT, splits, {"num_words": 0})
    with pytest.raises(UserError, match="config.eval.cross_attention has no key 'k'"):
        cross_attention.make(PREDICT, splits, {"k": 3})
