"""VQA and NLVR2: losses by hand, what is read of a record, sizes, and what is refused."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import image_texts as plain
from bivl import model as models
from bivl.core import config as configs
from bivl.core.errors import UserError
from bivl.core.optimizer import decay_mask, layer_scales
from bivl.data import sources
from bivl.models.heads import ComparisonHead
from bivl.models.transformer import Tokens
from bivl.objectives import nlvr2, vqa

pytestmark = pytest.mark.usefixtures("quick_compile")
IDS = {"kind": "ids", "path": "", "size": 64_002}
TASKS = ("vqa", "nlvr2")


def config(name, **changes):
    return plain.config(f"configs/finetune/{name}.py:smoke", plain.SMALL, **changes)


@functools.cache
def made(name):
    """The tiny objective and random parameters."""
    objective = models.make_objective(config(name))
    return objective, plain.created(objective)[0]


def statement(**changes):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    record = {"image": pixels[0], "image2": pixels[1], "text": "a cat", "label": 1, "id": 7}
    return {k: v for k, v in (record | changes).items() if v is not None}


def test_every_answer_is_told_right_or_wrong():
    rng = np.random.default_rng(0)
    logits, right = 3 * rng.normal(size=(4, 5)), rng.random((4, 5))
    p = 1 / (1 + np.exp(-logits))
    wanted = -(right * np.log(p) + (1 - right) * np.log(1 - p)).sum(-1).mean()
    np.testing.assert_allclose(vqa.mean_loss(jnp.asarray(logits), jnp.asarray(right)), wanted, 1e-5)
    labels = np.array([0, 4, 2, 2])
    one = vqa.mean_loss(jnp.asarray(logits), jnp.asarray(np.eye(5)[labels]))
    np.testing.assert_allclose(vqa.mean_loss(jnp.asarray(logits), jnp.asarray(labels)), one, 1e-6)
    assert np.isfinite(vqa.mean_loss(jnp.full((1, 2), 1e4), jnp.array([0])))


def test_a_statement_is_true_or_false():
    logits = np.array([[2.0, -1.0], [0.5, 0.0]])
    wanted = -plain.log_softmax(logits)[[0, 1], [1, 0]].mean()
    found = nlvr2.mean_loss(jnp.asarray(logits), jnp.array([1, 0]))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_spec_is_what_the_ops_give(name):
    objective, _ = made(name)
    example = objective.train_ops(statement(), np.random.default_rng(0))
    assert {k: (s.shape[1:], s.dtype) for k, s in objective.spec.items()} == {
        k: (np.shape(x), x.dtype) for k, x in example.items()
    }
    assert ("image2" in example) == (name == "nlvr2")
    seen = objective.eval_ops(statement())
    assert seen.keys() == example.keys() | {"id"} and seen["id"] == 7
    for key in {"image", "image2"} & seen.keys():  # the whole picture, squashed
        assert seen[key].shape == (16, 16, 3)
        given = objective.preprocess(**{k: [statement()[k]] for k in (key, "text")} | _first(key))
        np.testing.assert_allclose(given[key][0], seen[key] / 127.5 - 1, atol=1e-6)


def _first(key):
    return {"image": [statement()["image"]]} if key != "image" else {}


def test_pictures_of_questions_are_changed():
    c = config("vqa", augment__rand_level=7.0, augment__flip=False, augment__scale=(1.0, 1.0))
    assert c.augment.rand_layers == 2
    given = statement(image=np.full((16, 16, 3), 200, np.uint8))
    ops = models.make_objective(c).train_ops
    seen = [ops(given, np.random.default_rng(seed))["image"] for seed in range(12)]
    assert any((x == 200).all() for x in seen)
    assert any((x == 128).any() for x in seen) and not all((x == 128).any() for x in seen)
    c.augment.rand_level = 11.0
    with pytest.raises(UserError, match="config.augment.rand_level=11.0 must lie between 0 and 10"):
        models.make_objective(c)


def test_images_are_cropped_each_for_itself():
    c = config("nlvr2", augment__scale=(0.5, 0.6))
    same = statement(image2=statement()["image"])
    example = models.make_objective(c).train_ops(same, np.random.default_rng(0))
    assert (example["image"] != example["image2"]).any()


@pytest.mark.parametrize("name", TASKS)
def test_a_step_learns_from_the_labels(name):
    objective, params = made(name)
    rng, spec = np.random.default_rng(1), objective.spec
    batch = {k: rng.integers(0, 2, (4, *s.shape[1:])).astype(s.dtype) for k, s in spec.items()}
    batch["tokens"] = plain.texts(rng, 4, 10)["tokens"]

    @jax.jit
    def run(params):
        loss = lambda p: objective.loss(p, {}, batch, {}, jax.random.key(0))  # noqa: E731
        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, aux), grads = run(params)
    inputs = {k: x for k, x in batch.items() if k != "label"}
    logits = objective.predict["logits"](params, {}, inputs)
    mean_loss = {"vqa": vqa, "nlvr2": nlvr2}[name].mean_loss
    np.testing.assert_allclose(value, mean_loss(logits, batch["label"]), rtol=1e-5)
    assert logits.shape == (4, {"vqa": 30, "nlvr2": 2}[name]) and aux["weight"] == 4
    right = (np.argmax(logits, -1) == batch["label"]).mean()
    assert aux["metrics"] == {"train_accuracy": pytest.approx(right)}
    moved = plain.moved(grads)
    assert {"embed/words", "embed/patch", "trunk/image_blocks", "trunk/text_blocks"} <= moved
    assert {f"head/{key}" for key in params["head"]} <= moved
    maps = objective.predict["attention"](params, {}, inputs)
    assert maps.shape == (4, 2, 4, 4)


def test_two_images_are_read_apart():
    """Each with the text, then both by the head; other examples do not matter."""
    objective, params = made("nlvr2")
    rng = np.random.default_rng(3)
    batch = {k: plain.images(rng, 3)["image"] for k in ("image", "image2")}
    batch["tokens"] = plain.texts(rng, 3, 10, (2, 0, 4))["tokens"]
    encode, logits = (jax.jit(objective.predict[key]) for key in ("encode", "logits"))
    halves = []
    for key in ("image", "image2"):
        x = encode(params, {}, {"image": batch[key], "tokens": batch["tokens"]})["tokens"]
        halves.append(x)
    both = np.stack(halves, 1).reshape(6, *halves[0].shape[1:])
    head, layout = ComparisonHead(2), Tokens(jnp.asarray(both), images=17)
    wanted = head.apply({"params": params["head"]}, jnp.asarray(both), layout, True)
    np.testing.assert_allclose(logits(params, {}, batch), wanted, atol=1e-5)
    swapped = batch | {"image": batch["image2"], "image2": batch["image"]}
    assert (abs(logits(params, {}, swapped) - wanted) > 1e-3).any()


# Sizes and rates of the published recipes


def published(name, size):
    c = configs.load(f"configs/finetune/{name}.py:size={size}")
    c.tokenizer = IDS
    return c


@pytest.mark.parametrize(
    ("name", "size", "total"),
    [
        ("vqa", "base", 228_110_649),
        ("vqa", "large", 682_985_529),
        ("nlvr2", "base", 225_719_810),
        ("nlvr2", "large", 681_109_506),
    ],
)
def test_parameters_of_the_published_models(name, size, total):
    objective = models.make_objective(published(name, size))
    params = nn.unbox(jax.eval_shape(objective.init, jax.random.key(0))[0])
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == total


@pytest.mark.parametrize("name", TASKS)
def test_rates_and_decay_of_the_parts(name):
    _, params = made(name)
    decayed = decay_mask(params, config(name).optimizer.no_decay)
    embed, head = decayed["embed"], decayed["head"]
    assert not embed["image_positions"]["value"] and not embed["cls_token"]["value"]
    assert embed["text_positions"]["value"] and embed["words"]["table"]
    assert embed["mask_token"]["value"] and head["logits"]["kernel"] and not head["logits"]["bias"]
    scales = layer_scales(params, 0.5)
    assert scales["head"]["logits"]["kernel"] == 1
    assert scales["embed"]["text_positions"]["value"] == 0.5**3
    recipe = published(name, "base").optimizer
    paths = {key for key in params["head"] if re.search(recipe.fast, f"head/{key}/kernel")}
    assert recipe.fast_rate == {"vqa": 20, "nlvr2": 1}[name]
    assert name == "nlvr2" or paths == {"fc", "norm", "logits"}  # not the pooler
    assert (recipe.weight_decay, recipe.layer_decay) == {"vqa": (0.01, 1), "nlvr2": (0.2, 0.65)}[
        name
    ]


@pytest.mark.parametrize(
    "spec", ["vqa.py:size=tiny", "vqa.py:size=tiny,data=easy_vqa", "nlvr2.py:size=tiny"]
)
def test_classes_of_the_small_sets(spec):
    c = configs.load(f"configs/finetune/{spec}")
    if c.data.kind == "easy_vqa":
        pytest.importorskip("easy_vqa")
    for data in (c.data, {**c.data, **c.eval_data.test}):
        source = sources.open_source(data)
        assert len(source.classes) == c.num_classes
        assert {"image", "text", "label"} <= source[0].keys()
        assert source[0]["text"] == source[0].get("question", source[0]["text"])


# What is refused


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("nlvr2", {"image2": None}, r"the data has no image2; set config\.data\.fields\.image2"),
        ("vqa", {"image": None}, r"the data has no image; set config\.data\.fields\.image"),
        ("vqa", {"text": None}, r"the data has no text; set config\.data\.fields\.text"),
        ("vqa", {"label": None}, r"the data has no label; set config\.data\.fields\.label"),
        ("nlvr2", {"label": 2}, "record 7 has the label 2, but config.num_classes=2"),
    ],
)
def test_records_without_a_part(name, change, said):
    with pytest.raises(UserError, match=said):
        made(name)[0].train_ops(statement(**change), np.random.default_rng(0))


def test_inputs_without_a_part():
    for name, missing in (("vqa", "tokens"), ("nlvr2", "image2")):
        objective, params = made(name)
        batch = {k: np.zeros((1, *s.shape[1:]), s.dtype) for k, s in objective.spec.items()}
        del batch[missing]
        with pytest.raises(UserError, match=f"has no {missing.replace('tokens', 'text')}, which"):
            objective.predict["logits"](params, {}, batch)
    picture = np.zeros((48, 48, 3), np.uint8)
    with pytest.raises(UserError, match="got 2 of image and 1 of image2; each statement is about"):
        made("nlvr2")[0].preprocess(image=[picture] * 2, text=["a"] * 2, image2=[picture])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_classes": 1}, "config.num_classes=1 must be 2 or more"),
        ({"modality": "text"}, "config.modality='text'"),
        ({"pair__length": 30}, "config.pair.length=30 must lie between 4 and 18"),
    ],
)
def test_settings_that_cannot_be(changes, said):
    with pytest.raises(UserError, match=said):
        vqa.make(config("vqa", **changes))


@pytest.mark.parametrize("name", TASKS)
def test_options_that_are_none(name):
    with pytest.raises(UserError, match="size=huge is unknown"):
        configs.load(f"configs/finetune/{name}.py:size=huge")


def test_data_that_is_none():
    with pytest.raises(UserError, match="data=emoji is unknown"):
        configs.load("configs/finetune/vqa.py:size=tiny,data=emoji")
