"""BEiT v2's masked image modeling against numbers recorded from an independent computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bivl import model, train
from bivl.core import config as configs
from bivl.core import sharding
from bivl.core import state as states
from bivl.core import step as steps
from bivl.core.errors import UserError
from bivl.objectives import mim
from golden import vqkd as golden
from visual_tokens import small_mim, unboxed

G = golden.load()
pytestmark = pytest.mark.usefixtures("quick_compile")


def params():
    return jax.tree.map(jnp.asarray, golden.mim(lambda name: G[f"mim/params/{name}"]))


def batch():
    return {"image": jnp.asarray(G["mim/images"]), "mask": jnp.asarray(G["mim/mask"])}


@functools.cache
def objective():
    return model.make_objective(small_mim({"batch_size": "3"}))


@functools.cache
def held():
    """A fresh tokenizer."""
    return unboxed(objective())[1]


@pytest.mark.parametrize("depth", [2, 0])
def test_losses_and_gradients_match_the_reference(depth):
    """With aggregation, all gradients; without, the loss of the encoder alone."""
    made = model.make_objective(small_mim({"batch_size": "3", "aggregation.depth": str(depth)}))
    tree, codes = params(), jnp.asarray(G["mim/codes"])
    if not depth:
        del tree["aggregator"]
    differentiate = jax.jit(jax.value_and_grad(made.loss, has_aux=True))
    (loss, aux), grads = differentiate(tree, {}, batch(), codes, jax.random.key(0))
    wanted = {"mim": G["mim/loss/main"], "aggregation": G["mim/loss/aggregation"]}
    if not depth:
        np.testing.assert_allclose(loss, wanted["mim"], rtol=1e-5)
        assert "aggregation_loss" not in aux["metrics"]
        return
    for name, value in wanted.items():
        np.testing.assert_allclose(aux["metrics"][f"{name}_loss"], value, rtol=1e-5)
    np.testing.assert_allclose(loss, sum(wanted.values()), rtol=1e-5)
    recorded = golden.mim(lambda name: G[f"mim/grads/{name}"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, recorded)
    hidden = G["mim/codes"][G["mim/mask"]]
    right = G["mim/logits/main"].argmax(-1) == hidden
    assert aux["weight"] == 18 and 0 < right.mean() < 1
    np.testing.assert_allclose(aux["metrics"]["mim_accuracy"], right.mean(), rtol=1e-6)
    common = np.bincount(hidden).max() / 18
    np.testing.assert_allclose(aux["metrics"]["most_frequent"], common, rtol=1e-6)


def test_rows_with_fewer_masked_patches_count_only_those():
    mask = np.array([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]], bool)
    places, valid = mim.masked_places(jnp.asarray(mask), 3)
    np.testing.assert_array_equal(places, [[1, 3, 4], [2, 0, 1]])
    np.testing.assert_array_equal(valid, [[True, True, True], [True, False, False]])
    weight = valid.astype(float)
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4))
    codes = jnp.array([[0, 1, 2], [3, 0, 0]])
    loss, accuracy = mim.named(logits, codes, weight)
    logs = jax.nn.log_softmax(logits)
    picked = [logs[0, 0, 0], logs[0, 1, 1], logs[0, 2, 2], logs[1, 0, 3]]
    np.testing.assert_allclose(loss, -np.mean(picked), rtol=1e-5)
    right = [logits[0, i].argmax() == i for i in range(3)] + [logits[1, 0].argmax() == 3]
    np.testing.assert_allclose(accuracy, np.mean(right), rtol=1e-6)


def test_targets_are_the_tokenizers_codes_of_the_whole_crop():
    config = small_mim()
    tokenizer = model.make_objective(configs.from_dict(config.teacher.config.to_dict()))
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3)).astype(np.uint8)
    made = jax.jit(objective().targets)
    mask = np.ones((3, 16), bool)
    got = made({}, held(), {}, {"image": images, "mask": mask}, jax.random.key(0))
    mine = held()["teacher"]
    wanted = tokenizer.predict["codes"](mine["params"], mine["extras"], {"image": images})
    np.testing.assert_array_equal(got, wanted)
    other = made({}, held(), {}, {"image": images, "mask": ~mask}, jax.random.key(0))
    np.testing.assert_array_equal(got, other)
    assert len(np.unique(got)) > 1


def test_masked_patches_do_not_show():
    tree, other = params(), dict(batch())
    pixels = np.repeat(np.repeat(G["mim/mask"].reshape(3, 4, 4), 4, 1), 4, 2)[..., None]
    other["image"] = jnp.where(pixels, 7.0, other["image"])
    loss = jax.jit(objective().loss)
    codes, key = jnp.asarray(G["mim/codes"]), jax.random.key(0)
    same = [loss(tree, {}, x, codes, key)[0] for x in (batch(), other)]
    assert same[0] == same[1]


def test_accumulation_changes_no_mean():
    """Rows with different numbers of masked patches; the codes of a random tokenizer."""
    made = model.make_objective(small_mim())
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    mask = np.stack([rng.permutation(16) < 3 + i % 4 for i in range(8)])
    state = states.State(jnp.int32(0), params(), held(), {}, ())
    accumulated = jax.jit(functools.partial(steps._accumulated, made), static_argnums=3)
    whole = {"image": jnp.asarray(images), "mask": jnp.asarray(mask)}
    results = [accumulated(state, whole, jax.random.key(0), n) for n in (1, 4)]
    for (aux, grads), (wanted, others) in zip(results[1:], results, strict=False):
        for name in ("loss", "mim_accuracy", "aggregation_loss"):
            value = wanted["metrics"][name]
            np.testing.assert_allclose(aux["metrics"][name], value, rtol=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), grads, others)


def test_the_added_blocks_start_as_pytorch_makes_them():
    """But for their last matrices, which are divided by sqrt(2 l)."""
    config = small_mim({"model.width": "64", "model.mlp_dim": "128"})
    with sharding.use(sharding.make_mesh(config.mesh)):
        made = model.make_objective(config)
        params = jax.jit(lambda: nn.unbox(made.init(jax.random.key(0))[0]["aggregator"]))()
    blocks = params["blocks"]
    bound = {"qkv": 1 / 8, "fc1": 1 / 8, "out": 1 / 8, "fc2": 128**-0.5}
    for module, name in (
        ("attention", "qkv"),
        ("attention", "out"),
        ("mlp", "fc1"),
        ("mlp", "fc2"),
    ):
        for i in range(2):
            scale = (2 * (2 + i + 1)) ** -0.5 if name in ("out", "fc2") else 1.0
            values = np.abs(blocks[module][name]["kernel"][i])
            wide = bound[name] * scale
            assert 0.99 * wide < values.max() <= wide
            np.testing.assert_allclose(values.mean(), wide / 2, rtol=0.05)
            if name != "qkv":
                values = np.abs(blocks[module][name]["bias"][i])
                assert 0.8 * bound[name] < values.max() <= bound[name]
    assert not blocks["attention"]["q_bias"]["value"].any()
    assert (blocks["scale1"]["value"] == config.model.layer_scale).all()


@pytest.mark.parametrize(("size", "total"), [("base", 106_143_056), ("large", 336_728_512)])
def test_parameters_of_the_published_sizes(size, total):
    config = configs.load(f"configs/pretrain/beit2.py:size={size}")
    with config.unlocked():
        config.teacher = configs.load("configs/pretrain/beit2.py:smoke").teacher
    given = {
        "image_size": "224",
        "model.patch_size": "16",
        "batch_size": "64",
        "codebook.size": "8192",
        "teacher.config.image_size": "224",
        "teacher.config.model.patch_size": "16",
    }
    configs.override(config, [(f"teacher.config.{key}", value) for key, value in given.items()])
    tree, _, _ = jax.eval_shape(lambda: model.make_objective(config).init(jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(tree)) == total
    assert tree["lm_head"]["kernel"].value.shape[-1] == 8192
    table = tree["embed"]["relative_position"]["table"]["value"].value
    assert table.shape == (732, config.model.num_heads)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregation.layer": "3"}, "config.aggregation.layer=3 must lie between"),
        ({"aggregation.layer": "0"}, "config.aggregation.layer=0 must lie between"),
        ({"masking.kind": "random"}, "config.masking.kind='random'"),
        ({"teacher.config.objective": "frozen"}, "config.teacher.config.objective='frozen'"),
        ({"image_size": "32"}, r"makes \(8, 8\) patches and the teacher's 16 \(4, 4\)"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        model.make_objective(small_mim(changes))


def test_a_run(one_device, tmp_path):
    changes = {"optimizer.warmup_steps": "0", "evaluators": "knn,pictures", "eval.knn.k": "5"}
    state = train.train(small_mim(changes | {"model.drop_path": "0.2"}), tmp_path)
    assert int(state.step) == 4
    import bivl

    loaded = bivl.load(tmp_path)
    inputs = loaded.preprocess(image=[np.full((20, 30, 3), 40 * i, np.uint8) for i in range(3)])
    assert loaded.encode(inputs)["tokens"].shape == (3, 17, 16)
    inputs["mask"] = np.eye(3, 16, dtype=bool)
    assert loaded.predict["masked"](inputs).shape == (3, 16, 16)
