"""data2vec 2.0 on images against numbers recorded from an independent PyTorch computation.

What every recorded array is: docstring of tests/golden/record_data2vec2_vision.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bivl.core import config as configs
from bivl.modalities import image
from bivl.models.decoders import Decoder, DecoderConfig
from bivl.models.positions import sincos_2d
from bivl.models.transformer import EncoderConfig
from bivl.objectives import data2vec2, distillation
from golden import data2vec_vision

with np.load(data2vec_vision.FILE.with_name("data2vec2_vision.npz"), allow_pickle=False) as file:
    G = dict(file)
DECODERS = {"same": DecoderConfig(32, 2, 3, 4, noise=0.0)}
DECODERS["narrow"] = DecoderConfig(16, 2, 5, 4, noise=0.0)
E = "modality_encoders.IMAGE"


def linear(get, name):
    return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}


def norm(get, name):
    return {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}


def convolution(get, name):
    return {"kernel": get(f"{name}.weight").transpose(2, 3, 1, 0), "bias": get(f"{name}.bias")}


def block(get, name, heads=2):
    width = get(f"{name}.norm1.weight").shape[0]
    out = linear(get, f"{name}.attn.proj")
    biases = get(f"{name}.attn.qkv.bias").reshape(3, heads, -1)
    kernel = get(f"{name}.attn.qkv.weight").T.reshape(width, 3, heads, -1)
    return {
        "attention": {
            "qkv": {"kernel": kernel},
            "out": out | {"kernel": out["kernel"].reshape(heads, -1, width)},
        }
        | {f"{part}_bias": {"value": bias} for part, bias in zip("qkv", biases, strict=True)},
        "mlp": {part: linear(get, f"{name}.mlp.{part}") for part in ("fc1", "fc2")},
        "norm1": norm(get, f"{name}.norm1"),
        "norm2": norm(get, f"{name}.norm2"),
    }


def decoder(get):
    layers = {f"conv{i}": convolution(get, f"{E}.decoder.blocks.{i}.0") for i in range(2)}
    return layers | {"projection": linear(get, f"{E}.decoder.proj")}


def tree(prefix, with_decoder=True):
    """Arrays `prefix/NAME` in the tree of Data2Vec2's params."""

    def get(name):
        return G[f"{prefix}/{name}"]

    blocks = [block(get, f"blocks.{i}") for i in range(3)]
    params = {
        "embed": {
            "patch": {"projection": convolution(get, f"{E}.local_encoder.proj")},
            "cls_token": {"value": get(f"{E}.extra_tokens")},
        },
        "trunk": {
            "blocks": data2vec_vision.stack(blocks),
            "input_norm": norm(get, f"{E}.context_encoder.norm"),
        },
    }
    return params | {"decoder": decoder(get)} if with_decoder else params


def arrays(*args):
    return jax.tree.map(jnp.asarray, tree(*args))


def batch():
    return {
        "image": jnp.asarray(G["images"]),
        "mask": jnp.asarray(G["mask"], bool),
        "keep": jnp.asarray(G["keep"], jnp.int32),
    }


def recorded_config():
    """The shipped smoke config at the sizes that the numbers were recorded with."""
    config = configs.load("configs/pretrain/data2vec2_image.py:smoke")
    with config.unlocked():
        config.image_size, config.batch_size, config.top_k_layers = 32, 3, 2
        config.mask_ratio, config.masking.num_masks = 11 / 16, 2
        config.loss.cls_weight = 1.28
        config.model.update({"width": 32, "depth": 3, "num_heads": 2, "mlp_dim": 128})
        config.decoder.update({"width": 32, "depth": 2, "kernel": 3, "groups": 4, "noise": 0.0})
    return config


@functools.cache
def encoded(prefix, masked):
    config = recorded_config()
    embed, encoder = image.make_embed(config, "float32"), EncoderConfig.of(config.model, "float32")
    model = data2vec2.Data2Vec2(embed, encoder, DECODERS["same"], (4, 4))
    options = {"collect": ("layers", "ffn"), "method": "encode"}
    encode = jax.jit(lambda p, b: model.apply({"params": p}, b, masked, **options)[1])
    return encode(arrays(prefix, False), batch())


def assert_trees_close(got, wanted, scale=1e-6):
    """Every leaf within `scale` times its own size (at least 1), and the same leaves."""

    def close(path, a, b):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, atol=scale * max(1.0, np.abs(b).max()), err_msg=name)

    jax.tree_util.tree_map_with_path(close, got, wanted)


def test_sincos_table_matches_the_reference():
    np.testing.assert_allclose(sincos_2d((4, 4), 32), G["positions"], atol=1e-6)


def test_teacher_layers_match_the_reference():
    out = encoded("teacher_params", False)
    np.testing.assert_allclose(np.stack(out.layers), G["teacher/layers"], atol=1e-5)
    np.testing.assert_allclose(np.stack(out.ffn)[:, :, 1:], G["teacher/ffn"], atol=1e-5)


def test_kept_token_layers_match_the_reference():
    out = encoded("params", True)
    np.testing.assert_allclose(np.stack(out.layers), G["student/layers"], atol=1e-5)
    np.testing.assert_allclose(out.tokens[:, 0], G["cls"], atol=1e-5)


def test_targets_match_the_reference():
    objective = data2vec2.make(recorded_config())
    teacher = arrays("teacher_params", False)
    got = jax.jit(objective.targets)(teacher, teacher, {}, batch(), jax.random.key(0))
    np.testing.assert_allclose(got["values"], G["targets"], atol=1e-5)


def decode(config, params, kept, key=0):
    keep = batch()["keep"].reshape(6, 5)
    rngs = {"dropout": jax.random.key(key)}
    return Decoder(config, (4, 4)).apply({"params": params}, kept, keep, False, rngs=rngs)


def test_loss_predictions_and_gradients_match_the_reference():
    config = recorded_config()
    objective = data2vec2.make(config)
    targets = {"values": jnp.asarray(G["targets"]), "metrics": {}}
    differentiate = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (loss, aux), grads = differentiate(arrays("params"), {}, batch(), targets, jax.random.key(0))
    assert aux["weight"] == G["mask"].sum() == 3 * 2 * 11
    np.testing.assert_allclose(aux["metrics"]["regression_loss"], G["loss/same"], rtol=1e-6)
    np.testing.assert_allclose(aux["metrics"]["cls_loss"], G["loss/cls"], rtol=1e-6)
    np.testing.assert_allclose(loss, G["loss/same"] + 1.28 * G["loss/cls"], rtol=1e-6)
    assert_trees_close(grads, tree("grads"))


@pytest.mark.parametrize("variant", ["same", "narrow"])
def test_decoder_matches_the_reference(variant):
    """With the residual in every layer, and with a narrower one in all but the first."""
    prefix = {"same": "params", "narrow": "params/narrow"}[variant]
    params = decoder(lambda name: jnp.asarray(G[f"{prefix}/{name}"]))
    mask = jnp.asarray(G["mask"], bool).reshape(6, 16)
    targets = jnp.repeat(G["targets"], 2, axis=0)

    def loss(params):
        prediction = decode(DECODERS[variant], params, G["student/layers"][-1][:, 1:])
        each = distillation.regression_loss(prediction, targets, 0.0, "sum")
        return (each * mask).sum() / mask.sum(), prediction

    (value, prediction), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(prediction, G[f"prediction/{variant}"], atol=1e-5)
    np.testing.assert_allclose(value, G[f"loss/{variant}"], rtol=1e-6)
    if variant == "narrow":
        assert_trees_close(grads, decoder(lambda name: G[f"grads/narrow/{name}"]))


def test_noise_stands_in_masked_places_only(monkeypatch):
    """The same noise in the same places as the reference; visible tokens are not touched."""
    monkeypatch.setattr(jax.random, "normal", lambda key, shape: jnp.asarray(G["noise"] / 8))
    params = decoder(lambda name: jnp.asarray(G[f"params/{name}"]))
    noisy = DecoderConfig(32, 2, 3, 4, noise=8.0)
    got = decode(noisy, params, G["student/layers"][-1][:, 1:])
    np.testing.assert_allclose(got, G["prediction/noisy"], atol=1e-5)


def test_noise_reaches_visible_places_only_through_the_convolution():
    """With a kernel of 1 every place is on its own: noise then moves masked predictions alone."""
    params = decoder(lambda name: jnp.asarray(G[f"params/{name}"]))
    for layer in (params["conv0"], params["conv1"]):
        layer["kernel"] = layer["kernel"][1:2, 1:2]
    kept = G["student/layers"][-1][:, 1:]
    quiet, first, second = (
        np.asarray(decode(DecoderConfig(32, 2, 1, 4, noise=noise), params, kept, key))
        for noise, key in ((0.0, 0), (0.01, 0), (0.01, 1))
    )
    hidden = G["mask"].astype(bool).reshape(6, 16)
    for noisy in (first, second):
        np.testing.assert_array_equal(noisy[~hidden], quiet[~hidden])
        assert (noisy[hidden] != quiet[hidden]).any(-1).all()
    assert (first[hidden] != second[hidden]).any(-1).all()


@functools.cache
def initial():
    return nn.unbox(jax.jit(data2vec2.make(recorded_config()).init)(jax.random.key(0))[:2])


def test_the_teacher_has_no_decoder_and_starts_as_the_student():
    params, teacher = initial()
    assert set(params) - set(teacher) == {"decoder"}
    tracked = {name: params[name] for name in teacher}
    jax.tree.map(np.testing.assert_array_equal, tracked, teacher)


def test_initial_statistics():
    """Decoder's kernels and biases ~ U(-1, 1) / sqrt(fan in), CLS ~ N(0, 1), patches xavier."""
    params, _ = initial()
    fans = {"conv0": 9 * 8, "conv1": 9 * 8, "projection": 32}
    for name, fan in fans.items():
        for part in ("kernel", "bias"):
            x = np.abs(params["decoder"][name][part]) * fan**0.5
            assert 0.7 < x.max() <= 1 and 0.3 < x.mean() < 0.7, (name, part)
    assert 0.7 < params["embed"]["cls_token"]["value"].std() < 1.4
    bound = (6 / (3 * 8 * 8 + 32)) ** 0.5
    patch = np.abs(params["embed"]["patch"]["projection"]["kernel"])
    assert 0.95 * bound < patch.max() <= bound


PUBLISHED = {  # size: tokens x width of the fixed table, encoder and decoder millions of fairseq
    "base": (196 * 768, 85.8, 2.6),
    "large": (196 * 1024, 303.3, 6.0),
    "huge": (256 * 1280, 630.8, 6.6),
}
OURS = {  # trainable parameters of encoder and decoder
    "base": (85_647_360, 2_585_856),
    "large": (303_099_904, 5_967_872),
    "huge": (630_435_840, 6_639_872),
}


@pytest.mark.parametrize("size", sorted(PUBLISHED))
def test_parameter_counts(size):
    """fairseq's encoder counts its frozen sin-cos table [T, D] as a parameter; ours has none."""
    config = configs.load(f"configs/pretrain/data2vec2_image.py:size={size}")
    with config.unlocked():
        config.batch_size = 1
    params, teacher, _ = jax.eval_shape(data2vec2.make(config).init, jax.random.key(0))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    assert (count(teacher), count(params["decoder"])) == OURS[size]
    table, encoder, decoder_millions = PUBLISHED[size]
    assert round((count(teacher) + table) / 1e6, 1) == encoder
    assert round(count(params["decoder"]) / 1e6, 1) == decoder_millions
    assert round(count(teacher) / 1e6, 1) != encoder  # the table is what makes up the difference
