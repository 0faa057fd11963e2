"""data2vec 1.0 on text against numbers recorded from an independent PyTorch computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sequences
from bivl.modalities import text
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec, distillation

NAME = "data2vec_text"
G = sequences.load(NAME)
INPUTS = {"paper": "full", "shipped": "masked"}  # recorded loss: target.input
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def recorded_ids(monkeypatch):
    monkeypatch.setattr(text.tokenizers, "load", lambda config: sequences.Tokenizer())


@functools.cache
def config(variant="paper"):
    """The shipped loss, targets, optimizer and sharing; rates of two short steps."""
    c = sequences.recorded_config("data2vec_text.py:smoke", text__length=24)
    with c.unlocked():
        c.model.embed_dropout, c.target.input = 0.0, INPUTS[variant]
        c.optimizer.update({"learning_rate": 2.0**-8, "warmup_steps": 0})
    return c


@functools.cache
def objective(variant="paper"):
    return data2vec.make(config(variant))


def model():
    c = config()
    encoder = EncoderConfig.of(c.model, "float32")
    return data2vec.Data2Vec(text.make_embed(c, "float32"), encoder, c.head.layers, c.head.init)


def batch():
    ids = {"tokens": G["tokens"], "inputs": G["source"]}
    return {k: jnp.asarray(v, jnp.int32) for k, v in ids.items()} | {
        "mask": jnp.asarray(G["mask"], bool)
    }


@functools.cache
def differentiated(variant):
    """(loss, aux), gradients from the recorded targets."""
    targets = {"values": jnp.asarray(G[f"{variant}/targets/mean"]), "metrics": {}}
    differentiate = jax.jit(jax.value_and_grad(objective(variant).loss, has_aux=True))
    params, _ = sequences.models(NAME, objective())
    return differentiate(params, {}, batch(), targets, jax.random.key(0))


def whole_teacher():
    return jax.tree.map(jnp.asarray, sequences.tree(NAME, "teacher_param", "param"))


def test_student_layers_match_the_reference():
    params, _ = sequences.models(NAME, objective())
    tokens, encoded, seen = sequences.observed(model(), params, batch(), True)
    np.testing.assert_allclose(seen["embed/norm"][0], G["student/embedded"], atol=sequences.EXACT)
    np.testing.assert_array_equal(tokens.padding, G["tokens"] == 1)
    sequences.assert_layers(encoded, G, "student")


@pytest.mark.parametrize("variant", sorted(INPUTS))
def test_teacher_input_and_layers_match_the_reference(variant):
    given = text.teacher_input(config(variant))(batch())
    np.testing.assert_array_equal(given["tokens"], G[f"{variant}/tokens"])
    _, encoded, seen = sequences.observed(model(), whole_teacher(), given, False)
    embedded = G[f"{variant}/embedded"]
    np.testing.assert_allclose(seen["embed/norm"][0], embedded, atol=sequences.EXACT)
    sequences.assert_layers(encoded, G, variant)


def test_the_teacher_of_the_code_sees_closed_up_positions():
    """What README.md calls `shipped`: positions count masked tokens alone (fairseq issue 4881)."""
    table = sequences.tree(NAME, "param")["embed"]["positions"]["value"]
    words = sequences.tree(NAME, "param")["embed"]["tokens"]["table"]
    for variant in INPUTS:
        places = G[f"{variant}/embedded"] - words[G[f"{variant}/tokens"]]
        np.testing.assert_allclose(places, table[G[f"{variant}/positions"]], atol=1e-5)
    assert (G["shipped/positions"] != G["paper/positions"])[G["mask"].astype(bool)].mean() > 0.9


@pytest.mark.parametrize("variant", sorted(INPUTS))
def test_targets_match_the_reference(variant):
    c = config(variant)
    layers = [jnp.asarray(x) for x in G[f"{variant}/ffn"][-2:]]
    norms = c.target.layer_norms
    for x, wanted in zip(layers, G[f"{variant}/targets/normalized"], strict=True):
        got = distillation.average_targets([x], norms)
        np.testing.assert_allclose(got, wanted, atol=sequences.TARGETS)
    params, teacher = sequences.models(NAME, objective(variant))
    targets = jax.jit(objective(variant).targets)
    got = targets(params, teacher, {}, batch(), jax.random.key(0))["values"]
    np.testing.assert_allclose(got, G[f"{variant}/targets/mean"], atol=sequences.TARGETS)


def test_predictions_match_the_reference():
    params, _ = sequences.models(NAME, objective())
    got = jax.jit(model().apply)({"params": params}, batch())
    np.testing.assert_allclose(got[batch()["mask"]], G["prediction"], atol=sequences.EXACT)


@pytest.mark.parametrize("variant", sorted(INPUTS))
def test_losses_and_gradients_match_the_reference(variant):
    (loss, aux), grads = differentiated(variant)
    np.testing.assert_allclose(loss, G[f"loss/{variant}"], rtol=1e-5)
    for name in ("target_std", "prediction_std"):
        np.testing.assert_allclose(aux["metrics"][name], G[f"{variant}/{name}"], rtol=1e-5)
    assert aux["weight"] == G["mask"].sum() == 13
    if variant == "paper":
        sequences.assert_gradients(grads, sequences.tree(NAME, "grad"))


def test_pads_have_no_gradient():
    embed = differentiated("paper")[1]["embed"]
    assert not embed["tokens"]["table"][1].any() and not embed["positions"]["value"][1].any()


def test_two_steps_match_the_reference():
    """Clipping, decay of every parameter, layers averaged, embeddings copied."""
    params, teacher = sequences.models(NAME, objective())
    result = sequences.take_steps(config(), objective(), params, teacher, batch(), updates=8)
    sequences.assert_steps(NAME, "paper", result)


def test_the_teacher_averages_layers_alone():
    params, teacher = sequences.models(NAME, objective())
    assert set(params) == {"embed", "trunk", "head"} and set(teacher) == {"trunk"}
