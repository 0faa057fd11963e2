"""VQ-KD against numbers recorded from an independent PyTorch computation, and as a run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl import model, train
from bivl.core import config as configs
from bivl.core import state as states
from bivl.core import step as steps
from bivl.core.errors import UserError
from bivl.models import quantizer
from bivl.objectives import frozen
from golden import vqkd as golden
from visual_tokens import small_vqkd, unboxed

G = golden.load()


def params():
    return jax.tree.map(jnp.asarray, golden.vqkd(lambda name: G[f"vqkd/params/{name}"]))


def extras(fitted=True):
    vectors = jnp.asarray(G["vqkd/codebook"])
    idle = jnp.full(12, quantizer.NEVER)
    return {"codebook": {"vectors": vectors, "idle": idle, "fitted": jnp.array(fitted)}}


@functools.cache
def objective():
    return model.make_objective(small_vqkd({"batch_size": "3"}))


def test_losses_and_all_gradients_match_the_reference():
    batch, target = {"image": jnp.asarray(G["vqkd/images"])}, jnp.asarray(G["vqkd/target"])
    differentiate = jax.jit(jax.value_and_grad(objective().loss, has_aux=True))
    (loss, aux), grads = differentiate(params(), extras(), batch, target, jax.random.key(0))
    wanted = {f"{name}_loss": G[f"vqkd/loss/{name}"] for name in ("cosine", "quantization")}
    for name, value in wanted.items():
        np.testing.assert_allclose(aux["metrics"][name], value, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(loss, sum(wanted.values()), rtol=1e-5)
    np.testing.assert_allclose(aux["rows"]["units"], G["vqkd/units"], atol=1e-5)
    assert aux["weight"] == 48
    recorded = golden.vqkd(lambda name: G[f"vqkd/grads/{name}"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, recorded)
    _, moved, metrics = objective().update({}, extras(), {}, aux, 1)
    np.testing.assert_allclose(moved["codebook"]["vectors"], G["vqkd/moved"][0], atol=1e-5)
    used = len(np.unique(G["vqkd/codes"]))
    np.testing.assert_allclose(metrics["codebook_usage"], used / 12, rtol=1e-6)


def test_codes_match_the_reference():
    codes = jax.jit(objective().predict["codes"])
    batch = {"image": jnp.asarray(G["vqkd/images"])}
    got = codes(params(), extras(), batch)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, G["vqkd/codes"])
    ready = {"image": G["vqkd/images"] / np.float32(127.5) - 1}  # as `preprocess` gives them
    np.testing.assert_array_equal(codes(params(), extras(), ready), got)


def test_codes_are_row_by_row():
    """What changes a patch's pixels changes the code map there: one block and no attention."""
    config = small_vqkd({"model.depth": "1"})
    tokenizer = model.make_objective(config)
    tree, _, more = jax.tree.map(jnp.asarray, unboxed(tokenizer))
    tree["trunk"]["blocks"]["attention"]["out"]["kernel"] *= 0
    tree["embed"]["positions"]["table"]["value"] *= 0
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[0, 4:8, 8:12] = np.random.default_rng(0).integers(0, 256, (4, 4, 3))
    units = jax.jit(lambda: tokenizer.predict["encode"](tree, more, {"image": image})["tokens"])()
    other = np.abs(units[0] - units[0, 0]).max(-1) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(other), [1 * 4 + 2])


def test_the_teacher_sees_raw_images_and_gives_its_content_tokens():
    """It normalises by its own statistics, not by ours."""
    config = small_vqkd()
    teacher = frozen.open(config)
    held = unboxed(objective())[1]
    images = G["vqkd/images"]
    got = jax.jit(objective().targets)({}, held, {}, {"image": images}, jax.random.key(0))
    mean, std = np.array(teacher.config.image_mean), np.array(teacher.config.image_std)
    ready = {"image": ((images / 255 - mean) / std).astype(np.float32)}
    wanted = jax.jit(lambda: teacher.tell("encode", held, ready)["tokens"])()
    assert wanted.shape == (3, 17, 6) and got.shape == (3, 16, 6)
    np.testing.assert_allclose(got, wanted[:, 1:], atol=1e-5)


def first_update(accumulate, fitted):
    """The codebook and metrics after one update of 8 images in micro-batches."""
    made = model.make_objective(small_vqkd())
    teacher = unboxed(made)[1]
    images = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    state = states.State(jnp.int32(0), params(), teacher, extras(fitted), ())

    def run(state, batch):
        aux, grads = steps._accumulated(made, state, batch, jax.random.key(0), accumulate)
        return *made.update(teacher, state.extras, state.params, aux, 1)[1:], aux["metrics"], grads

    return jax.jit(run)(state, {"image": jnp.asarray(images)})


@pytest.mark.parametrize("fitted", [True, False])
def test_accumulation_changes_neither_codebook_nor_means(fitted):
    wanted = first_update(1, fitted)
    assert wanted[0]["codebook"]["fitted"]
    for accumulate in (2, 4):
        got = first_update(accumulate, fitted)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(close, got, wanted)


def test_the_first_update_fits_the_codebook_to_the_batch():
    extra, metrics, *_ = first_update(1, False)
    book = extra["codebook"]
    old = np.asarray(G["vqkd/codebook"])
    assert metrics["codebook_usage"] == 1 and metrics["codebook_perplexity"] > 6
    assert np.abs(book["vectors"] - old).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(book["vectors"], axis=-1), 1, rtol=1e-6)
    again = first_update(1, True)[0]["codebook"]
    cosines = (again["vectors"] * old).sum(-1)
    assert (cosines > 0.99).all()  # a fitted one only moves


def test_usage_counts_the_window():
    update = model.make_objective(small_vqkd({"codebook.window": "3"})).update
    book, seen = extras(), []
    for code in (0, 1, 1, 1, 1):
        units = jnp.ones((1, 1, 4)) / 2
        found = quantizer.totals(units, jnp.full((1, 1), code), 12)
        aux = {"sums": found, "rows": {"units": jnp.ones((8, 16, 4)) / 2}}
        _, book, metrics = update({}, book, {}, aux, 1)
        seen.append(float(metrics["codebook_usage"]) * 12)
    np.testing.assert_allclose(seen, [1, 2, 2, 1, 1], rtol=1e-5)


def counts(changes=()):
    """Parameters of the base model by part, with a teacher of CLIP's 512 channels."""
    config = configs.load("configs/pretrain/vqkd.py:size=base")
    smoke = configs.load("configs/pretrain/vqkd.py:smoke")
    with config.unlocked():
        config.teacher = smoke.teacher
    given = {"image_size": "224", "model.patch_size": "16", "model.width": "512"}
    settings = {f"teacher.config.{key}": value for key, value in given.items()}
    configs.override(config, list((settings | dict(changes)).items()))
    tree, _, more = jax.eval_shape(lambda: model.make_objective(config).init(jax.random.key(0)))
    assert more["codebook"]["vectors"].shape == (8192, 32)
    return {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in tree.items()}


@pytest.mark.parametrize(
    ("layers", "decoder", "total"), [(3, 21_440_256, 108_829_216), (1, 7_266_048, 94_655_008)]
)
def test_parameters_of_the_published_sizes(layers, decoder, total):
    found = counts({"decoder.depth": str(layers)})
    assert found["embed"] + found["trunk"] == 85_789_440
    assert found["decode_embed"] + found["decode_trunk"] == decoder
    assert sum(found.values()) == total


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook.size": "200"}, "config.codebook.size=200 must lie between 1 and the 128 "),
        ({"codebook.decay": "1.5"}, "config.codebook.decay=1.5"),
        ({"codebook.kmeans": "0"}, "config.codebook.kmeans=0"),
        ({"decoder.depth": "0"}, "config.decoder.depth=0"),
        ({"image_size": "32"}, r"makes \(8, 8\) patches and the teacher's 16 \(4, 4\)"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        model.make_objective(small_vqkd(changes))


def test_a_run(one_device, tmp_path):
    """Trains, leaves the teacher alone, saves the codebook, and gives features of images."""
    changes = {"optimizer.warmup_steps": "0", "evaluators": "knn", "eval.knn.k": "5"}
    state = train.train(small_vqkd(changes), tmp_path)
    assert state.extras["codebook"]["fitted"] and int(state.step) == 4
    params, teacher, _ = unboxed(objective())
    jax.tree.map(np.testing.assert_array_equal, state.teacher, teacher)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), state.params, params)))
    import bivl

    loaded = bivl.load(tmp_path)
    batch = loaded.preprocess(image=[np.full((20, 30, 3), 40 * i, np.uint8) for i in range(3)])
    codes = loaded.predict["codes"](batch)
    assert codes.shape == (3, 16) and set(np.unique(codes)) <= set(range(12))
    assert loaded.encode(batch)["tokens"].shape == (3, 16, 16)
    np.testing.assert_allclose(np.linalg.norm(loaded.embed(batch), axis=-1), 1, rtol=1e-5)
