"""data2vec 2.0 on text against numbers recorded from an independent PyTorch computation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import closeness
import sequences
from bivl.modalities import text
from bivl.models.decoders import DecoderConfig
from bivl.models.layers import gather_kept
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec2, distillation

NAME = "data2vec2_text"
G = sequences.load(NAME)
CLONES = 3
pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def recorded_ids(monkeypatch):
    monkeypatch.setattr(text.tokenizers, "load", lambda config: sequences.Tokenizer())


@functools.cache
def config():
    """The shipped loss, targets, optimizer and sharing; rates of two short steps."""
    c = sequences.recorded_config("data2vec2_text.py:smoke", text__length=24)
    with c.unlocked():
        c.masking.num_masks, c.model.embed_dropout = CLONES, 0.0
        c.decoder.update({"width": 16, "depth": 3, "dropout": 0.0, "noise": 0.0})
        c.optimizer.update({"learning_rate": 2.0**-8, "warmup_steps": 0})
    return c


@functools.cache
def objective():
    return data2vec2.make(config())


def model():
    c = config()
    embed, encoder = text.make_embed(c, "float32"), EncoderConfig.of(c.model, "float32")
    return data2vec2.Data2Vec2(embed, encoder, DecoderConfig(**c.decoder), (24,))


def batch():
    return {
        "tokens": jnp.asarray(G["tokens"], jnp.int32),
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
    closeness.assert_seen(run, G, {"norm": "features"})
    closeness.assert_layers(run, G, "student")


def test_teacher_layers_and_normalisations_match_the_reference():
    run = forward()["calm"]["teacher"]
    closeness.assert_layers(run, G, "teacher")
    closeness.assert_normalized(run, G, "", config().target.layer_norms)
    got = distillation.average_targets(run.encoded.ffn[-2:], ("layer",), ("instance",))
    np.testing.assert_allclose(got, G["targets/large/final"], atol=closeness.CLOSE)


def test_padded_batches_match_the_reference():
    """At tokens that are none: ours holds zeros at pads where fairseq leaves what comes out."""
    padded = {"tokens": jnp.asarray(G["padded/tokens"], jnp.int32)}
    real = G["padded/tokens"] != 1
    params, _ = sequences.models(NAME, objective())
    run = jax.jit(lambda params: sequences.observed(model(), params, padded, False))(params)
    np.testing.assert_array_equal(run.tokens.padding, ~real)
    closeness.assert_seen(run, G, {"norm": "padded/features"})
    got, wanted = np.stack(run.encoded.layers)[:, real], G["padded/layers"][:, real]
    np.testing.assert_allclose(got, wanted, atol=closeness.CLOSE)


@pytest.mark.parametrize("name", ["calm", "noisy"])
def test_targets_predictions_and_losses_match_the_reference(name):
    out = forward()[name]
    np.testing.assert_allclose(out["targets"], G["targets/mean"], atol=closeness.CLOSE)
    prediction, special = out["output"]
    assert special.shape == (2 * CLONES, 0, 32)
    np.testing.assert_allclose(prediction, G[f"prediction/{name}"], atol=closeness.CLOSE)
    np.testing.assert_allclose(out["loss"], G[f"loss/{name}"], rtol=1e-5)
    assert out["weight"] == G["mask"].sum() == 2 * CLONES * 12
    for key in ("target_std", "prediction_std") if name == "calm" else ():
        np.testing.assert_allclose(out[key], G[key], rtol=1e-5)


def test_gradients_and_two_steps_match_the_reference():
    """Clipping, decay of every parameter, and a teacher that has blocks alone."""
    models = sequences.models(NAME, objective())
    history = sequences.take_steps(config(), objective(), models, batch(), updates=8)
    closeness.assert_steps(NAME, "calm", history)
    assert G["step/calm/grad_norm"].min() > config().optimizer.clip_norm == 1


def test_the_teacher_averages_blocks_alone():
    params, teacher = sequences.models(NAME, objective())
    assert set(params) == {"embed", "trunk", "decoder"} and set(teacher) == {"trunk"}


@pytest.mark.parametrize("shared", [True, False])
def test_the_teacher_shares_the_dropout_of_the_embedding(shared):
    """fairseq's teacher reads the student's local features, dropped out (target.embed_dropout)."""
    c = config().copy_and_resolve_references()
    with c.unlocked():
        c.model.embed_dropout, c.target.embed_dropout = 0.5, shared
    o = data2vec2.make(c)
    params, teacher = sequences.models(NAME, o)

    def run(params, teacher, batch):
        seen, key = [], jax.random.key(3)

        def watch(call, args, kwargs, context):
            out = call(*args, **kwargs)
            seen.extend([out.x] if context.module.path == ("embed",) else [])
            return out

        with nn.intercept_methods(watch):
            targets = o.targets(params, teacher, {}, batch, key)
            o.loss(params, {}, batch, targets, key)
        return seen

    of_teacher, of_student = jax.jit(run)(params, teacher, batch())
    zeros = (np.asarray(of_student) == 0).mean()
    assert 0.4 < zeros < 0.6
    kept = gather_kept(of_teacher, batch()["keep"])
    if shared:
        np.testing.assert_array_equal(kept, of_student)
        assert 0.4 < (np.asarray(of_teacher) == 0).mean() < 0.6
    else:
        np.testing.assert_allclose(of_teacher, G["features"], atol=closeness.CLOSE)
    assert config().target.embed_dropout is True


def test_initial_statistics_of_the_decoder():
    """Convolutions U(-1, 1) / sqrt(fan in), linear maps N(0, 0.02^2)."""
    params = sequences.initial(objective())["decoder"]
    for name, fan in (("conv0", 9 * 32), ("conv1", 9 * 16), ("conv2", 9 * 16)):
        closeness.assert_uniform(params[name], fan)
    closeness.assert_normal({name: params[name] for name in ("fc", "projection")})
