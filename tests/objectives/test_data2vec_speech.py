"""data2vec 1.0 on speech against numbers recorded from an independent PyTorch computation."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sequences
from bivl.core import flops, optimizer
from bivl.core import step as steps
from bivl.core.state import State
from bivl.modalities import speech
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec, distillation
from golden import sequence_files

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
def student_run():
    params, _ = sequences.models(NAME, objective())
    return sequences.observed(model(), params, batch(), True)


def test_features_match_the_reference():
    _, _, seen = student_run()
    np.testing.assert_allclose(seen["embed/extractor"][1], G["extracted"], atol=sequences.EXACT)
    np.testing.assert_allclose(seen["embed/projection"][1], G["features"], atol=sequences.EXACT)
    params, _ = sequences.models(NAME, objective())
    _, _, seen = sequences.observed(model(), params, batch("cropped"), True)
    got, wanted = seen["embed/projection"][1], G["cropped/features"]
    np.testing.assert_allclose(got, wanted, atol=sequences.EXACT)


def test_student_layers_match_the_reference():
    tokens, encoded, seen = student_run()
    positions = seen["embed/positions"][1]
    np.testing.assert_allclose(positions, G["student/positions"], atol=sequences.EXACT)
    np.testing.assert_array_equal(tokens.padding, G["padding"])
    sequences.assert_layers(encoded, G, "student")


def test_teacher_layers_match_the_reference():
    whole = jax.tree.map(jnp.asarray, sequences.tree(NAME, "teacher_param", "param"))
    _, encoded, seen = sequences.observed(model(), whole, batch(), False)
    positions = seen["embed/positions"][1]
    np.testing.assert_allclose(positions, G["teacher/positions"], atol=sequences.EXACT)
    sequences.assert_layers(encoded, G, "teacher")


def test_target_normalisations_match_the_reference():
    layers = [jnp.asarray(x) for x in G["teacher/ffn"][-2:]]
    norms = config().target.layer_norms
    for x, wanted in zip(layers, G["targets/normalized"], strict=True):
        got = distillation.average_targets([x], norms)
        np.testing.assert_allclose(got, wanted, atol=sequences.TARGETS)
    got = distillation.average_targets(layers, norms, ("layer",))
    np.testing.assert_allclose(got, G["targets/audioset/final"], atol=sequences.TARGETS)


@pytest.mark.parametrize("variant, name", [("padded", ""), ("cropped", "cropped/")])
def test_targets_and_predictions_match_the_reference(variant, name):
    params, teacher = sequences.models(NAME, objective(variant))
    targets, given = jax.jit(objective(variant).targets), batch(variant)
    got = targets(params, teacher, {}, given, jax.random.key(0))["values"]
    np.testing.assert_allclose(got, G[f"{name}targets/mean"], atol=sequences.TARGETS)
    got = jax.jit(model().apply)({"params": params}, given)[given["mask"]]
    np.testing.assert_allclose(got, G[f"{name}prediction"], atol=sequences.EXACT)


@pytest.mark.parametrize("variant, name", [("padded", ""), ("cropped", "cropped/")])
def test_losses_and_gradients_match_the_reference(variant, name):
    targets = {"values": jnp.asarray(G[f"{name}targets/mean"]), "metrics": {}}
    differentiate = jax.jit(jax.value_and_grad(objective(variant).loss, has_aux=True))
    params, _ = sequences.models(NAME, objective())
    arguments = params, {}, batch(variant), targets, jax.random.key(0)
    (loss, aux), grads = differentiate(*arguments)
    np.testing.assert_allclose(loss, G[f"loss/{variant}"], rtol=1e-5)
    assert aux["weight"] == batch(variant)["mask"].sum()
    if variant == "cropped":
        sequences.assert_gradients(grads, sequences.tree(NAME, "grad"))
    else:
        for key in ("target_std", "prediction_std"):
            np.testing.assert_allclose(aux["metrics"][key], G[key], rtol=1e-5)


def test_two_steps_match_the_reference():
    """No clipping, tri-stage rate, layers and input norm averaged, convolutions copied."""
    params, teacher = sequences.models(NAME, objective("cropped"))
    arguments = params, teacher, batch("cropped")
    result = sequences.take_steps(config("cropped"), objective("cropped"), *arguments, updates=100)
    sequences.assert_steps(NAME, "cropped", result)
