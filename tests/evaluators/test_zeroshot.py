import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl import evaluate
from bivl.core import sharding
from bivl.core.errors import GuardStop, UserError
from bivl.data import sources
from bivl.evaluators import features, zeroshot
from configs import common

NAMES = ("cat", "dog", "sea_lion", "owl", "fox", "crow", "eel")
LENGTH = 40


def code(text):
    """A text as numbers of its letters, [LENGTH]."""
    letters = [ord(letter) for letter in text[:LENGTH]]
    return np.array(letters + [0] * (LENGTH - len(letters)), np.int32)


def vector(text):
    """A unit vector that depends on the text alone."""
    x = np.random.default_rng(code(text)).normal(size=5)
    return np.float32(x / np.linalg.norm(x))


def towers(seen=None):
    """predict: images are their own embeddings; a text's depends on all of its letters."""

    def text_embeddings(params, extras, batch):
        tokens = np.asarray(batch["tokens"])
        texts = ["".join(chr(letter) for letter in row if letter) for row in tokens]
        if seen is not None:
            seen.extend(texts)
        return jnp.asarray(np.stack([vector(text) for text in texts])) * params

    return {
        "image_embeddings": lambda params, extras, batch: batch["image"] * params,
        "text_embeddings": text_embeddings,
    }


def splits_of(image, label, classes=NAMES, size=4):
    def batches(split):
        for start in range(0, len(image), size):
            index = np.arange(start, start + size)
            rows = np.minimum(index, len(image) - 1)
            batch = {"image": jnp.asarray(image[rows]), "id": rows, "mask": index < len(image)}
            yield batch | ({} if label is None else {"label": label[rows]})

    def texts(given):
        for start in range(0, len(given), size):
            index = np.arange(start, start + size)
            tokens = np.stack([code(given[min(i, len(given) - 1)]) for i in index])
            yield {"tokens": jnp.asarray(tokens), "id": index, "mask": index < len(given)}

    return features.Splits(batches, classes, texts=texts)


def run(image, label, scale=1.0, seen=None, classes=NAMES, **settings):
    splits = splits_of(np.float32(image), label, classes)
    return zeroshot.make(towers(seen), splits, settings)(jnp.float32(scale), None)


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(count, 5))
    return image / np.linalg.norm(image, axis=1, keepdims=True), rng.integers(7, size=count)


def test_images_like_their_captions_are_right():
    label = np.arange(10) % 7
    image = [vector(f"a photo of a {NAMES[i].replace('_', ' ')}.") for i in label]
    found = run(image, label)
    assert found["zeroshot/accuracy"] == found["zeroshot/accuracy_5"] == 1
    assert found["zeroshot/chance"] == pytest.approx(0.2)
    found = run(image, (label + 1) % 7)
    assert found["zeroshot/accuracy"] == 0


@pytest.mark.parametrize("count", [1, 4, 13])
def test_templates_are_averaged_at_unit_length(count):
    image, label = draw(count)
    templates, seen = ("a {}", "two {}s or a {}?", "{}"), []
    found = run(image, label, seen=seen, templates=templates)
    classes = []
    for name in NAMES:
        spoken = [t.replace("{}", name.replace("_", " ")) for t in templates]
        assert set(spoken) <= set(seen)
        mean = np.mean([vector(text) for text in spoken], axis=0)
        classes.append(mean / np.linalg.norm(mean))
    order = np.argsort(-(image @ np.stack(classes).T), axis=1)
    assert found["zeroshot/accuracy"] == pytest.approx(np.mean(order[:, 0] == label))
    five = np.mean([one in row[:5] for one, row in zip(label, order, strict=True)])
    assert found["zeroshot/accuracy_5"] == pytest.approx(five)


def test_class_vectors_have_unit_length():
    texts = np.array([[1, 0], [0, 1], [1, 0], [-1, 0.0]])
    found = zeroshot.class_vectors(texts, 2)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0, 0]])


def test_equal_names_and_equal_images_answer_nothing():
    image, label = draw(9)
    assert run(image, label, classes=("thing",) * 7)["zeroshot/accuracy_5"] == 0
    few = run(image, label % 3, classes=NAMES[:3])
    assert set(few) == {"zeroshot/accuracy", "zeroshot/chance"}


def test_what_cannot_be_scored_is_refused():
    image, label = draw(5)
    for templates, shown in ((("a photo",), "'a photo'"), ((3,), "3"), ((), "''")):
        with pytest.raises(UserError, match=f"zeroshot.templates holds {shown}; give texts with"):
            run(image, label, templates=templates)
    assert run(image, label, templates="a {}") == run(image, label, templates=("a {}",))
    with pytest.raises(UserError, match="eval_data.train has no names of its classes; name a set"):
        run(image, label, classes=None)
    with pytest.raises(UserError, match="eval_data.test has no labels; "):
        run(image, None)
    with pytest.raises(UserError, match="label 6 but only 3 classes"):
        run(image, label * 0 + 6, classes=NAMES[:3])
    with pytest.raises(GuardStop, match="not finite"):
        run(image, label, scale=np.nan)
    with pytest.raises(UserError, match="no 'text_embeddings'; take zeroshot out of"):
        zeroshot.make({"image_embeddings": None}, splits_of(image, label))
    with pytest.raises(UserError, match="config.eval.zeroshot has no key 'k'"):
        run(image, label, k=3)


@pytest.fixture
def shapes():
    """The evaluators' splits of 16x16 coloured shapes, on a mesh of all devices."""
    config = common.base()
    config.batch_size = config.eval.batch_size = 8
    config.data = common.data(num_examples=11, image_size=16)
    config.eval_data.test.split = "test"
    objective = types.SimpleNamespace(
        eval_ops=lambda record: {"image": 255 - record["image"], "id": np.int32(record["id"])},
        preprocess=lambda text: {"tokens": np.stack([code(one) for one in text])},
    )
    mesh = sharding.make_mesh(config.mesh)
    splits = evaluate.make_splits(config, objective, mesh, {"image", "text"})
    return splits, sources.open_source(evaluate.data_of(config, "test"))


@pytest.mark.parametrize("count", [1, 8, 9])
def test_texts_reach_the_devices_in_order(shapes, count):
    splits, _ = shapes
    given = [f"text number {i}" for i in range(count)]
    batches = list(splits.texts(given))
    assert all(isinstance(batch["tokens"], jax.Array) for batch in batches)
    assert {batch["tokens"].shape for batch in batches} == {(8, LENGTH)}
    whole = {k: np.concatenate([batch[k] for batch in batches]) for k in ("tokens", "id", "mask")}
    np.testing.assert_array_equal(whole["tokens"][whole["mask"]], [code(text) for text in given])
    assert whole["id"][whole["mask"]].tolist() == list(range(count))
    assert np.all(whole["tokens"][~whole["mask"]] == code(given[-1]))
    found = features.embed_texts(towers(), splits, given, jnp.float32(1), None)
    np.testing.assert_allclose(found, [vector(text) for text in given], atol=1e-6)


def test_a_record_shows_its_text_and_what_the_model_sees(shapes):
    splits, source = shapes
    assert len(source) == 11
    for row in (0, 10):
        found = splits.record("test", row)
        assert found["text"] == source[row]["text"]
        np.testing.assert_array_equal(found["image"], 255 - source[row]["image"])
