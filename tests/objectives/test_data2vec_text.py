"""data2vec 1.0 on text against numbers recorded from an independent PyTorch computation."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import closeness
import sequences
from bivl.modalities import text
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec

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
def forward(variant):
    models = sequences.models(NAME, objective(variant))
    shown = text.teacher_input(config(variant))
    return sequences.forward(objective(variant), model(), models, batch(), shown)[0]


@functools.cache
def stepped():
    models = sequences.models(NAME, objective())
    return sequences.take_steps(config(), objective(), models, batch(), updates=8)


def test_student_layers_match_the_reference():
    run = forward("paper")["student"]
    embedded, _ = run.seen["embed/norm"]
    np.testing.assert_allclose(embedded, G["student/embedded"], atol=closeness.CLOSE)
    np.testing.assert_array_equal(run.tokens.padding, G["tokens"] == 1)
    closeness.assert_layers(run, G, "student")


@pytest.mark.parametrize("variant", sorted(INPUTS))
def test_teacher_input_layers_and_targets_match_the_reference(variant):
    given = text.teacher_input(config(variant))(batch())
    np.testing.assert_array_equal(given["tokens"], G[f"{variant}/tokens"])
    out = forward(variant)
    embedded, _ = out["teacher"].seen["embed/norm"]
    np.testing.assert_allclose(embedded, G[f"{variant}/embedded"], atol=closeness.CLOSE)
    closeness.assert_layers(out["teacher"], G, variant)
    closeness.assert_normalized(out["teacher"], G, f"{variant}/", config().target.layer_norms)
    wanted = G[f"{variant}/targets/mean"]
    np.testing.assert_allclose(out["targets"], wanted, atol=closeness.CLOSE)


@pytest.mark.parametrize("variant", sorted(INPUTS))
def test_positions_of_the_teacher_match_the_reference(variant):
    """`shipped` counts masked tokens alone, so that their positions close up (issue 4881)."""
    embed = sequences.tree(NAME, "param")["embed"]
    embedded, _ = forward(variant)["teacher"].seen["embed/norm"]
    places = embedded - embed["tokens"]["table"][G[f"{variant}/tokens"]]
    wanted = embed["positions"]["value"][G[f"{variant}/positions"]]
    np.testing.assert_allclose(places, wanted, atol=closeness.CLOSE)
    moved = G[f"{variant}/positions"] != G["paper/positions"]
    assert moved[G["mask"].astype(bool)].any() == (variant == "shipped")


@pytest.mark.parametrize("variant", sorted(INPUTS))
def test_predictions_and_losses_match_the_reference(variant):
    out = forward(variant)
    prediction = out["output"][batch()["mask"]]
    np.testing.assert_allclose(prediction, G["prediction"], atol=closeness.CLOSE)
    np.testing.assert_allclose(out["loss"], G[f"loss/{variant}"], rtol=1e-5)
    for name in ("target_std", "prediction_std"):
        np.testing.assert_allclose(out[name], G[f"{variant}/{name}"], rtol=1e-5)
    assert out["weight"] == G["mask"].sum() == 13


def test_gradients_and_two_steps_match_the_reference():
    """Clipping, decay of every parameter, layers averaged, embeddings copied."""
    closeness.assert_steps(NAME, "paper", stepped())
    assert G["step/paper/grad_norm"].max() > config().optimizer.clip_norm == 5


def test_pads_have_no_gradient():
    embed = stepped()[0][0].opt_state[0]["embed"]
    assert not embed["tokens"]["table"][1].any() and not embed["positions"]["value"][1].any()


def test_the_teacher_averages_layers_alone():
    params, teacher = sequences.models(NAME, objective())
    assert set(params) == {"embed", "trunk", "head"} and set(teacher) == {"trunk"}


def test_initial_statistics(monkeypatch):
    """N(0, 0.02^2), not cut, everywhere; biases 0; rows of pads 0."""
    many = sequences.Tokenizer(size=2000, mask=1999)
    monkeypatch.setattr(text.tokenizers, "load", lambda config: many)
    params = sequences.initial(data2vec.make(config()))
    table, positions = params["embed"]["tokens"]["table"], params["embed"]["positions"]["value"]
    assert table.shape == (2000, 32) and positions.shape == (26, 32)
    assert not table[1].any() and not positions[1].any()
    assert np.abs(np.delete(table, 1, 0)).sum(1).min() > 0
    np.testing.assert_allclose(np.delete(table, 1, 0).std(), 0.02, rtol=0.02)
    np.testing.assert_allclose(np.delete(positions, 1, 0).std(), 0.02, rtol=0.15)
    closeness.assert_normal(params["trunk"])
    closeness.assert_normal(params["head"])
