"""Fine-tuning to classes and numbers: losses by hand, heads, scaled labels, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.models.heads import ClassificationHead
from bivl.models.transformer import Tokens
from bivl.objectives import classify

SMALL = {
    "model.width": "32",
    "model.depth": "1",
    "model.num_heads": "2",
    "model.mlp_dim": "64",
    "batch_size": "8",
}
IMAGE = {"image_size": "32", "data.image_size": "32"}

pytestmark = pytest.mark.usefixtures("quick_compile")


def load(spec, **changes):
    """A small fine-tuning config; `__` in `changes` stands for dots."""
    config = configs.load(f"configs/finetune/{spec}")
    changes = {name.replace("__", "."): str(value) for name, value in changes.items()}
    sizes = SMALL | (IMAGE if config.modality == "image" else {})
    configs.override(config, list((sizes | changes).items()))
    return config


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_by_hand(smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.normal(size=(5, 4)), np.array([0, 3, 1, 1, 2])
    logs = np.log(softmax(logits))
    # (1 - s) of the class's own and s of the mean over all classes (Szegedy et al. 2016).
    expected = -(1 - smoothing) * logs[range(5), labels] - smoothing * logs.mean(1)
    found = classify.each_loss(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_soft_targets_are_taken_as_they_are():
    rng = np.random.default_rng(1)
    logits, soft = rng.normal(size=(3, 4)), softmax(rng.normal(size=(3, 4)))
    found = classify.each_loss(jnp.asarray(logits), jnp.asarray(soft), 0.5)
    np.testing.assert_allclose(found, -(soft * np.log(softmax(logits))).sum(1), rtol=1e-5)
    best = jnp.asarray(soft.argmax(1))
    assert classify.agreement(jnp.asarray(soft), best) == 1
    assert (
        classify.agreement(jnp.asarray(soft), jnp.asarray(np.eye(4)[(soft.argmax(1) + 1) % 4])) == 0
    )


def test_one_output_is_regression():
    found = classify.each_loss(jnp.array([[1.0], [-2.0]]), jnp.array([0.5, 1.0]), 0.1)
    np.testing.assert_allclose(found, [0.25, 9.0])


def head(**changes):
    options = {"pool": "mean", "norm": False, "hidden": False, "dropout": 0.0, "scale": 1.0}
    return ClassificationHead(3, **(options | changes))


@pytest.mark.parametrize("padded", [False, True])
def test_the_mean_is_of_valid_content_tokens(padded):
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    padding = jnp.arange(6) >= jnp.array([[4], [6]]) if padded else None
    layout = Tokens(x, special=1, padding=padding)
    model = head()
    params = model.init(jax.random.key(1), x, layout, True)
    kernel = params["params"]["logits"]["kernel"].unbox()
    lengths = (4, 6) if padded else (6, 6)
    for found, row, n in zip(model.apply(params, x, layout, True), x, lengths, strict=True):
        np.testing.assert_allclose(found, row[1:n].mean(0) @ kernel, atol=1e-6)


def test_robertas_head_reads_the_first_token():
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    model, layout = head(pool="first", hidden=True), Tokens(x)
    params = model.init(jax.random.key(1), x, layout, True)
    tree = {
        k: {n: np.asarray(b.unbox()) for n, b in v.items()} for k, v in params["params"].items()
    }
    assert set(tree) == {"dense", "logits"}
    hidden = np.tanh(np.asarray(x[:, 0]) @ tree["dense"]["kernel"])
    found = model.apply(params, x, layout, True)
    np.testing.assert_allclose(found, hidden @ tree["logits"]["kernel"], atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_the_last_kernel_is_scaled(scale):
    model, x = ClassificationHead(50, "mean", True, False, 0.0, scale), jnp.ones((1, 2, 64))
    tree = model.init(jax.random.key(0), x, Tokens(x), True)["params"]["logits"]
    assert float(tree["kernel"].unbox().std()) == pytest.approx(0.02 * scale, rel=0.05)
    assert not tree["bias"].unbox().any()


def abstract(config):
    """The objective, abstract params, and a batch of zeros as its spec says."""
    objective = classify.make(config)
    params = jax.eval_shape(objective.init, jax.random.key(0))[0]
    batch = {name: jnp.zeros(s.shape, s.dtype) for name, s in objective.spec.items()}
    return objective, params, batch


def test_updates_of_data2vec2_are_those_of_its_files():
    """`max_update` of fairseq's `mae_imagenet_clean.yaml`, `_large_clean` and `_huge_clean`."""
    for size, steps in {"base": 250_200, "large": 125_200, "huge": 125_200}.items():
        assert configs.load(f"configs/finetune/data2vec2_image.py:size={size}").steps == steps


@pytest.mark.parametrize("spec", ["data2vec_image.py:smoke", "data2vec2_image.py:smoke"])
def test_shapes_of_images(spec):
    objective, params, batch = abstract(load(spec, num_classes=7))
    assert {name: s.shape for name, s in objective.spec.items()} == {
        "image": (8, 32, 32, 3),
        "label": (8,),
        "erase": (8, 4),
    }
    logits = jax.eval_shape(objective.predict["logits"], params, {}, {"image": batch["image"]})
    assert logits.shape == (8, 7) and logits.dtype == jnp.float32
    loss, aux = jax.eval_shape(objective.loss, params, {}, batch, {}, jax.random.key(0))
    assert loss.shape == () and set(aux["metrics"]) == {"train_accuracy"}


def test_an_utterance_can_be_classified():
    config = configs.load("configs/pretrain/data2vec_speech.py:smoke")
    with config.unlocked():
        config.objective, config.masking = "classify", {"kind": "none"}
        config.num_classes, config.label_scale, config.smoothing = 5, 1.0, 0.0
        config.classifier = {"pool": "mean", "norm": False, "hidden": False}
        config.classifier.update({"dropout": 0.0, "scale": 1.0})
    objective, params, batch = abstract(config)
    loss, aux = jax.eval_shape(objective.loss, params, {}, batch, {}, jax.random.key(0))
    assert loss.shape == () and set(batch) == {"audio", "length", "label"}
    record = {"audio": np.zeros(30_000, np.float32), "label": 4, "id": 1}
    example = objective.train_ops(record, np.random.default_rng(0))
    assert {k: np.shape(v) for k, v in example.items()} == {
        k: v.shape[1:] for k, v in batch.items()
    }


def test_nothing_erased_or_mixed_leaves_normalised_images():
    config = load("data2vec2_image.py:smoke", augment__mix_probability=0, smoothing=0.2)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    batch = {"image": images, "label": jnp.array([3, 1]), "erase": jnp.zeros((2, 4), int)}
    batch["image"] = jnp.asarray(images)
    run = jax.jit(lambda batch: classify.augmented(config, batch, jax.random.key(0)))
    found, soft = run(batch)
    mean, std = np.array(config.image_mean), np.array(config.image_std)
    np.testing.assert_allclose(found, (images / 255 - mean) / std, atol=1e-5)
    np.testing.assert_allclose(soft, 0.8 * np.eye(10)[[3, 1]] + 0.02, atol=1e-6)


TEXT = {"text__length": 24, "text__input_length": 12, "model__embed_dropout": 0.0}
TEXT |= {"model__dropout": 0.0, "model__attention_dropout": 0.0}


@functools.cache
def regression():
    """(objective of one output whose labels are learned as fifths, params, compiled logits)."""
    objective = classify.make(load("glue.py:smoke", num_classes=1, label_scale=0.2, **TEXT))
    params = jax.jit(objective.init)(jax.random.key(0))[0]
    params = jax.tree.map(lambda x: 3 * x, params)  # or all logits are almost zero
    return objective, params, jax.jit(objective.predict["logits"])


def tokens(objective, texts, pairs=None):
    return {"tokens": jnp.asarray(objective.preprocess(text=texts, text_pair=pairs)["tokens"])}


def test_scaled_labels_come_back_in_their_own_unit():
    objective, params, logits = regression()
    assert objective.spec["label"].dtype == jnp.float32
    record = {"text": "a dog", "text_pair": "the cat", "label": 3.5}
    example = objective.train_ops(record, np.random.default_rng(0))
    assert example["label"] == np.float32(3.5) and example["label"].dtype == np.float32
    batch = {name: jnp.asarray(np.stack([value] * 8)) for name, value in example.items()}
    said = logits(params, {}, {"tokens": batch["tokens"]})[:, 0]
    loss, _ = jax.jit(objective.loss)(params, {}, batch, {}, jax.random.key(0))
    assert float(loss) == pytest.approx(float(jnp.mean((0.2 * said - 0.2 * 3.5) ** 2)), rel=1e-4)


def test_padding_changes_no_answer():
    objective, params, logits = regression()
    alone = logits(params, {}, tokens(objective, ["a dog"]))
    batch = tokens(objective, ["a dog", "the cat sat on the mat and ate the mouse"])
    assert batch["tokens"].shape[1] > 4
    np.testing.assert_allclose(logits(params, {}, batch)[0], alone[0], atol=1e-5)


def test_inputs_are_shorter_than_the_positions():
    objective, params, _ = regression()
    assert objective.spec["tokens"].shape == (8, 12)
    assert params["embed"]["positions"]["value"].unbox().shape == (26, 32)
    record = {"text": "word " * 30, "label": 1}
    assert objective.eval_ops(record)["tokens"].shape == (12,)
    assert objective.preprocess(text=["word " * 30])["tokens"].shape == (1, 12)


@pytest.mark.parametrize(
    ("spec", "changes", "words"),
    [
        ("glue.py:smoke", {"num_classes": 0}, "config.num_classes=0 must be 1"),
        ("glue.py:smoke", {"smoothing": 1}, "config.smoothing=1"),
        ("glue.py:smoke", {"label_scale": 0}, "config.label_scale=0"),
        ("glue.py:smoke", {"classifier__pool": "max"}, "config.classifier.pool='max' is unknown"),
        ("glue.py:smoke", {"text__input_length": 99}, "config.text.input_length=99 must lie .*=64"),
        ("data2vec_image.py:smoke", {"num_classes": 1}, "is regression, which Mixup"),
    ],
)
def test_settings_that_cannot_be(spec, changes, words):
    with pytest.raises(UserError, match=words):
        classify.make(load(spec, **changes))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "a"}, "the data has no label; set config.data.fields.label"),
        ({"label": 1}, "the data has no text; set config.data.fields.text"),
        ({"text": "a", "label": 9, "id": 7}, "record 7 has the label 9, but config.num_classes=9"),
        ({"text": "a", "label": -1}, "has the label -1"),
        ({"text": "a", "label": 1.5}, "has the label 1.5"),
        ({"text": "a", "label": float("nan")}, "has the label nan"),
    ],
)
def test_records_that_cannot_be_learned(record, words):
    ops = classify.make(load("glue.py:smoke")).train_ops
    with pytest.raises(UserError, match=words) as error:
        ops(record, np.random.default_rng(0))
    assert "\n" not in str(error.value)


def test_a_number_must_be_finite():
    with pytest.raises(UserError, match="record 3 has the label inf"):
        regression()[0].train_ops({"text": "a", "label": np.inf, "id": 3}, None)


def test_data_with_more_classes_than_the_model():
    class Data:
        title, classes = "animals", ("cat", "dog", "owl")

    assert classify.make(load("glue.py:smoke")).examples(Data) is Data
    assert regression()[0].examples(Data) is Data
    words = r"config.num_classes=2 but the data has 3 classes \(animals\); set"
    with pytest.raises(UserError, match=words):
        classify.make(load("glue.py:smoke", num_classes=2)).examples(Data)
