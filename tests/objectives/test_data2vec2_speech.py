"""data2vec 2.0 on speech against numbers recorded from an independent PyTorch computation."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import closeness
import sequences
from bivl.modalities import speech
from bivl.models.decoders import DecoderConfig
from bivl.models.positions import Alibi, alibi_slopes
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec2

NAME = "data2vec2_audio"
G = sequences.load(NAME)
CLONES, FRAMES = 3, 16
pytestmark = pytest.mark.usefixtures("quick_compile")


@functools.cache
def config():
    """The shipped loss, targets, optimizer and sharing; rates of two short steps."""
    c = sequences.recorded_config("data2vec2_speech.py:smoke", audio__length=G["raw"].shape[1])
    with c.unlocked():
        c.masking.num_masks, c.model.extractor.width = CLONES, 8
        c.model.position_conv.update({"kernel": 19, "groups": 4})
        c.decoder.update({"width": 16, "depth": 3, "groups": 4, "dropout": 0.0, "noise": 0.0})
        c.optimizer.update({"learning_rate": 2.0**-8, "warmup_steps": 0, "clip_norm": 0.0})
    return c


@functools.cache
def objective():
    return data2vec2.make(config())


def model():
    c = config()
    embed, encoder = speech.make_embed(c, "float32"), EncoderConfig.of(c.model, "float32")
    return data2vec2.Data2Vec2(embed, encoder, DecoderConfig(**c.decoder), (FRAMES,))


def batch():
    rows = [speech.eval_ops(config())({"audio": row.astype(np.float32)}) for row in G["raw"]]
    return {
        "audio": jnp.stack([row["audio"] for row in rows]),
        "length": jnp.stack([row["length"] for row in rows]),
        "mask": jnp.asarray(G["mask"], bool),
        "keep": jnp.asarray(G["keep"], jnp.int32),
    }


@functools.cache
def forward():
    """Without noise, and with the recorded noise in masked places."""
    c = config().copy_and_resolve_references()
    c.decoder.noise = 1.0
    o, decoding = data2vec2.make(c), DecoderConfig(**c.decoder)
    models, given = sequences.models(NAME, o), model().clone(decoding=decoding)
    noise = jnp.zeros(G["noise"].shape), jnp.asarray(G["noise"])
    outs = sequences.forward(o, given, models, batch(), noise=noise)
    return dict(zip(("calm", "noisy"), outs, strict=True))


def test_student_layers_match_the_reference():
    run = forward()["calm"]["student"]
    names = {"extractor": "extracted", "projection": "features", "positions": "student/positions"}
    closeness.assert_seen(run, G, names)
    np.testing.assert_allclose(run.tokens.bias, G["alibi/kept"], atol=closeness.CLOSE)
    closeness.assert_layers(run, G, "student")


def test_teacher_layers_and_normalisations_match_the_reference():
    run = forward()["calm"]["teacher"]
    closeness.assert_seen(run, G, {"positions": "teacher/positions"})
    for bias in run.tokens.bias:
        np.testing.assert_allclose(bias, G["alibi/teacher"], atol=closeness.CLOSE)
    closeness.assert_layers(run, G, "teacher")
    closeness.assert_normalized(run, G, "", config().target.layer_norms)


@pytest.mark.parametrize("heads", [4, 12, 16])
def test_alibi_slopes_match_the_reference(heads):
    np.testing.assert_allclose(alibi_slopes(heads), G[f"alibi/slopes{heads}"], rtol=1e-6)


def test_alibi_of_the_student_matches_the_reference():
    """At all places, with a scale below zero, which counts as zero."""
    scale = sequences.tree(NAME, "param")["embed"]["bias"]
    assert scale["scale"]["value"].min() < 0
    got = Alibi(4).apply({"params": scale}, jnp.arange(FRAMES)[None])
    np.testing.assert_allclose(got[0], G["alibi/full"], atol=closeness.CLOSE)


@pytest.mark.parametrize("name", ["calm", "noisy"])
def test_targets_predictions_and_losses_match_the_reference(name):
    out = forward()[name]
    np.testing.assert_allclose(out["targets"], G["targets/mean"], atol=closeness.CLOSE)
    prediction, special = out["output"]
    assert special.shape == (2 * CLONES, 0, 32)
    np.testing.assert_allclose(prediction, G[f"prediction/{name}"], atol=closeness.CLOSE)
    np.testing.assert_allclose(out["loss"], G[f"loss/{name}"], rtol=1e-5)
    assert out["weight"] == G["mask"].sum() == 2 * CLONES * 8
    for key in ("target_std", "prediction_std") if name == "calm" else ():
        np.testing.assert_allclose(out[key], G[key], rtol=1e-5)


def test_gradients_and_two_steps_match_the_reference():
    """No clipping; all but extractor, projection and decoder averaged, ALiBi's scale too."""
    models = sequences.models(NAME, objective())
    history = sequences.take_steps(config(), objective(), models, batch(), updates=8)
    closeness.assert_steps(NAME, "calm", history, rtol=1e-4)  # README.md: loss of step 2 to 5e-5


def test_the_teacher_lacks_extractor_projection_and_decoder():
    params, teacher = sequences.models(NAME, objective())
    assert set(params) - set(teacher) == {"decoder"}
    assert set(params["embed"]) - set(teacher["embed"]) == {"extractor", "norm", "projection"}


def test_initial_statistics_of_the_decoder_and_alibi():
    """Everything U(-1, 1) / sqrt(fan in); one scale a head, shared by all layers, at 1."""
    params = sequences.initial(objective())
    np.testing.assert_array_equal(params["embed"]["bias"]["scale"]["value"], np.ones(4))
    fans = {"conv0": 7 * 32 // 4, "conv1": 7 * 4, "conv2": 7 * 4, "projection": 16}
    for name, fan in fans.items():
        closeness.assert_uniform(params["decoder"][name], fan)
