"""data2vec 1.0 on speech against numbers recorded from an independent PyTorch computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import closeness
import sequences
from bivl.core import flops
from bivl.core import step as steps
from bivl.core.state import State
from bivl.modalities import speech
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec, distillation

NAME = "data2vec_audio"
G = sequences.load(NAME)
SAMPLES, FRAMES = {"padded": 5333, "cropped": 4105}, {"padded": 16, "cropped": 12}
pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def config(variant="padded"):
    """The shipped loss, targets, optimizer and sharing; rates of the recorded steps."""
    c = sequences.recorded_config("data2vec_speech.py:smoke", audio__length=SAMPLES[variant])
    with c.unlocked():
        c.model.extractor.width, c.model.position_conv.groups = 8, 4
        c.optimizer.update({"learning_rate": 2.0**-6, "phases": (0.03, 0.9, 0.07)})
    return c


@functools.cache
def objective(variant="padded"):
    return data2vec.make(config(variant))


def model():
    c = config()
    encoder = EncoderConfig.of(c.model, "float32")
    return data2vec.Data2Vec(speech.make_embed(c, "float32"), encoder, c.head.layers, c.head.init)


def batch(variant="padded"):
    """Rows normalised and padded as in training; `cropped`: both cut to the shorter first."""
    lengths = np.minimum(G["lengths"], SAMPLES[variant])
    rows = [raw[:n] for raw, n in zip(G["raw"].astype(np.float32), lengths, strict=True)]
    examples = [speech.eval_ops(config(variant))({"audio": row}) for row in rows]
    stacked = {key: jnp.stack([jnp.asarray(e[key]) for e in examples]) for key in examples[0]}
    return stacked | {"mask": jnp.asarray(G["mask"][:, : FRAMES[variant]], bool)}


@functools.cache
def forward(variant):
    models = sequences.models(NAME, objective(variant))
    return sequences.forward(objective(variant), model(), models, batch(variant))[0]


def test_student_layers_match_the_reference():
    run = forward("padded")["student"]
    names = {"extractor": "extracted", "projection": "features", "positions": "student/positions"}
    closeness.assert_seen(run, G, names)
    np.testing.assert_array_equal(run.tokens.padding, G["padding"])
    closeness.assert_layers(run, G, "student")
    features = {"projection": "cropped/features"}
    closeness.assert_seen(forward("cropped")["student"], G, features)


def test_teacher_layers_and_normalisations_match_the_reference():
    run = forward("padded")["teacher"]
    closeness.assert_seen(run, G, {"positions": "teacher/positions"})
    closeness.assert_layers(run, G, "teacher")
    closeness.assert_normalized(run, G, "", config().target.layer_norms)
    got = distillation.average_targets(run.encoded.ffn[-2:], ("instance",), ("layer",))
    np.testing.assert_allclose(got, G["targets/audioset/final"], atol=closeness.CLOSE)


@pytest.mark.parametrize("variant, name", [("padded", ""), ("cropped", "cropped/")])
def test_targets_predictions_and_losses_match_the_reference(variant, name):
    out, mask = forward(variant), batch(variant)["mask"]
    np.testing.assert_allclose(out["targets"], G[f"{name}targets/mean"], atol=closeness.CLOSE)
    prediction = out["output"][mask]
    np.testing.assert_allclose(prediction, G[f"{name}prediction"], atol=closeness.CLOSE)
    np.testing.assert_allclose(out["loss"], G[f"loss/{variant}"], rtol=1e-5)
    assert out["weight"] == mask.sum()
    for key in ("target_std", "prediction_std") if variant == "padded" else ():
        np.testing.assert_allclose(out[key], G[key], rtol=1e-5)


def test_gradients_and_two_steps_match_the_reference():
    """No clipping, tri-stage rate, layers and input norm averaged, convolutions copied."""
    c, o = config("cropped"), objective("cropped")
    models = sequences.models(NAME, o)
    history = sequences.take_steps(c, o, models, batch("cropped"), updates=100)
    closeness.assert_steps(NAME, "cropped", history)


def test_the_teacher_averages_layers_and_norm_alone():
    params, teacher = sequences.models(NAME, objective())
    assert set(params) == {"embed", "trunk", "head"} and set(teacher) == {"trunk"}
    assert set(teacher["trunk"]) == {"blocks", "input_norm"}


def small_config(shared):
    """Two convolutions and one block: quick to compile."""
    c = config().copy_and_resolve_references()
    with c.unlocked():
        c.audio.length, c.model.depth, c.top_k_layers, c.masking.span = 96, 1, 1, 2
        c.model.extractor.update({"kernels": (4, 3), "strides": (2, 2)})
        c.model.position_conv.update({"depth": 1, "kernel": 3})
        c.ema_shared = shared
    return c


def test_accumulation_changes_no_mask():
    """Rows are compared before they are cut into micro-batches."""
    o = objective()
    state = State(jnp.int32(0), *sequences.models(NAME, o), {}, ())
    given = batch() | {"order": jnp.tile(jnp.arange(FRAMES["padded"]), (2, 1))}
    given["mask"] = jnp.arange(FRAMES["padded"]) < jnp.array([[8], [3]])
    run = jax.jit(functools.partial(steps._accumulated, o), static_argnums=3)
    one, two = (run(state, given, jax.random.key(0), n)[0] for n in (1, 2))
    assert one["weight"] == two["weight"] < 8 + 3
    np.testing.assert_allclose(one["metrics"]["loss"], two["metrics"]["loss"], rtol=1e-6)


def operations(c):
    """What XLA counts in the compiled gradients of a step."""
    o = data2vec.make(c)
    params, teacher, _ = nn.unbox(jax.eval_shape(o.init, jax.random.key(0)))

    def run(params, teacher, batch):
        key, batch = jax.random.key(0), o.prepare(batch)
        targets = jax.lax.stop_gradient(o.targets(params, teacher, {}, batch, key))
        return jax.grad(lambda params: o.loss(params, {}, batch, targets, key)[0])(params)

    return jax.jit(run).lower(params, teacher, o.spec).compile().cost_analysis()["flops"]


def test_the_front_end_of_student_and_teacher_runs_once():
    """A teacher with a front-end of its own costs that much more, matmuls alone counted."""
    shared, own = (operations(small_config(shared)) for shared in (("embed", "head"), ()))
    c = small_config(())
    embed, batch = speech.make_embed(c, "float32"), speech.spec(c)
    zeros = {k: jnp.zeros(s.shape, s.dtype) for k, s in batch.items()}
    params = jax.eval_shape(embed.init, jax.random.key(0), zeros)
    apply = functools.partial(embed.apply, method="features")
    assert own - shared >= flops.count(apply, params, batch) > 0


def test_initial_statistics():
    """Extractor He-normal, other convolutions and projections U(-1, 1) / sqrt(fan in), the mask
    vector U(0, 1), blocks N(0, 0.02^2)."""
    c = config().copy_and_resolve_references()
    c.model.extractor.width = 64
    params = sequences.initial(data2vec.make(c))
    embed = params["embed"]
    for i, fan in enumerate((10, *[3 * 64] * 4, *[2 * 64] * 2)):
        kernel = embed["extractor"][f"conv{i}"]["kernel"]
        assert set(embed["extractor"][f"conv{i}"]) == {"kernel"}
        np.testing.assert_allclose(kernel.std(), (2 / fan) ** 0.5, rtol=0.1)
        assert np.abs(kernel).max() > 2.3 * (2 / fan) ** 0.5  # not cut at two deviations
    closeness.assert_uniform(embed["projection"], 64)
    for i in range(5):
        closeness.assert_uniform(embed["positions"][f"conv{i}"], 19 * 8)
    fill = embed["fill"]["value"]
    assert 0 <= fill.min() < 0.2 and 0.8 < fill.max() <= 1
    closeness.assert_uniform(params["head"]["projection"], 32)
    closeness.assert_normal(params["trunk"])
