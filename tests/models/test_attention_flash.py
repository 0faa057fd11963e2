"""The TPU kernel, interpreted on CPU, against `attend`: any length, masks, meshes, encoders."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from jax.experimental.pallas.ops.tpu import flash_attention

from bivl.core import sharding
from bivl.core.errors import UserError
from bivl.models import attention_kernels
from bivl.models.attention import attend
from bivl.models.multiway import Multiway, MultiwayConfig
from bivl.models.transformer import Encoder, EncoderConfig, Tokens

KEY = jax.random.key(0, impl="rbg")
SIZES = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24, "scan": True}
CLOSE = 3e-6
pytestmark = pytest.mark.usefixtures("quick_compile", "interpreted")


@pytest.fixture
def interpreted(monkeypatch):
    """Programs are for TPUs, and XLA interprets their kernels."""
    call = functools.partial(pallas.pallas_call, interpret=True)
    monkeypatch.setattr(
        flash_attention, "pl", types.SimpleNamespace(**vars(pallas) | {"pallas_call": call})
    )
    monkeypatch.setattr(attention_kernels, "platform", lambda: "tpu")


def given(rows, length, pads=(), dtype="float32"):
    """q, k, v and the gradient of the output, [B, 2, L, 8]; bool [B, L], the last `pads` True."""
    rng = np.random.default_rng(length)
    arrays = [jnp.asarray(rng.standard_normal((rows, 2, length, 8)), dtype) for _ in range(4)]
    pads = np.array([*pads, *[0] * rows][:rows])
    return *arrays, jnp.asarray(np.arange(length) >= length - pads[:, None])


def with_gradients(kernel, q, k, v, gradient, **options):
    """The output and the gradients of q, k, v."""

    def run(q, k, v, gradient):
        out, pull = jax.vjp(lambda *x: attend(*x, **options, kernel=kernel)[0], q, k, v)
        return out, *pull(gradient)

    return jax.tree.map(np.asarray, jax.jit(run)(q, k, v, gradient))


def assert_same(arrays, **options):
    wanted, found = (with_gradients(kernel, *arrays, **options) for kernel in ("xla", "flash"))
    for x, y in zip(wanted, found, strict=True):
        np.testing.assert_allclose(y, x, rtol=0, atol=CLOSE)


def caption_mask(images, length):
    """[L, L]: texts see images and what stands before them, images only images."""
    i, j = np.ogrid[:length, :length]
    return jnp.where((j < images) | (i >= images) & (j <= i), 0.0, -1e8)


@pytest.mark.parametrize(("length", "pads"), [(13, (4,)), (50, None), (197, (0, 60))])
def test_any_length_is_the_same(length, pads):
    *arrays, padding = given(2, length, pads or ())
    assert_same(arrays, padding=padding if pads else None)


def test_several_blocks_are_the_same(monkeypatch):
    monkeypatch.setattr(attention_kernels, "blocks", lambda length: (256, 128))
    *arrays, padding = given(1, 150, (9,))
    assert_same(arrays, padding=padding)


def test_caption_masks_are_the_same():
    *arrays, padding = given(2, 13, (3,))
    assert_same(arrays, bias=caption_mask(5, 13), padding=padding)


def test_a_row_of_pads_stays_finite():
    *arrays, padding = given(2, 13, (13,))
    for x in with_gradients("flash", *arrays, padding=padding):
        assert np.isfinite(x).all()


@pytest.mark.parametrize("rows", [4, 1])
def test_every_device_has_its_own_share(rows):
    """Examples over data and fsdp, heads over tensor; one example alone stays whole."""
    *arrays, padding = given(rows, 13, (4,))
    with sharding.use(sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        options = {"padding": padding, "kernel": "flash"}
        text = str(jax.make_jaxpr(lambda *x: attend(*x, **options)[0])(*arrays[:3]))
        assert f"f32[{max(rows // 4, 1)},1,128,8]" in text  # padded
        if rows > 1:
            assert_same(arrays, padding=padding)


def test_a_bias_that_would_be_learned_is_refused():
    arrays = given(1, 13)[:3]
    value = lambda bias: attend(*arrays, bias, kernel="flash")[0].sum()  # noqa: E731
    with pytest.raises(UserError, match="learns no attention bias"):
        jax.eval_shape(jax.grad(value), caption_mask(5, 13))


def test_blocks_of_any_length():
    for n, wanted in {1: 128, 128: 128, 197: 256, 512: 512}.items():
        assert attention_kernels.blocks(n) == (wanted, wanted)
    for n in range(513, 3000, 7):
        length, block = attention_kernels.blocks(n)
        assert n <= length < n + block and length % block == 0 and block in (256, 384, 512)
    assert attention_kernels.blocks(577) == (768, 384)
    assert attention_kernels.blocks(1024) == (1024, 512)


# Encoders


def multiway(**changes):
    return Multiway(MultiwayConfig(**SIZES | {"norm": "sub"} | changes))


def tokens(images=5, texts=4, bias=None):
    x = np.random.default_rng(7).standard_normal((2, images + texts, 16)).astype(np.float32)
    padding = np.zeros((2, images + texts), bool)
    padding[0, -1] = bool(texts)
    return Tokens(jnp.asarray(x), 1, bias, jnp.asarray(padding), images)


def moved(model, params, inputs):
    """The gradients of parameters and the outputs, of a pass as in training."""

    def value(params):
        x = model.apply({"params": params}, inputs, False).tokens
        return (x * jnp.cos(jnp.arange(x.size).reshape(x.shape))).sum(), x

    return jax.jit(jax.grad(value, has_aux=True))(params)


def assert_close(wanted, found):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(y, x, rtol=0, atol=1e-4), wanted, found)


@pytest.mark.parametrize("bias", [None, caption_mask(5, 9)], ids=["pair", "caption"])
def test_a_multiway_encoder_learns_the_same(bias):
    inputs = tokens(bias=bias)
    params = jax.jit(lambda: multiway().init(KEY, inputs)["params"])()
    models = (multiway(attention=kernel) for kernel in ("xla", "flash"))
    assert_close(*(moved(model, params, inputs) for model in models))


@pytest.mark.parametrize("alone", [{"texts": 0}, {"images": 0}], ids=["image", "text"])
def test_one_modality_alone_is_the_same(alone):
    params = jax.jit(lambda: multiway().init(KEY, tokens())["params"])()

    def run(kernel):
        model, inputs = multiway(attention=kernel), tokens(**alone)
        return jax.jit(lambda params: model.apply({"params": params}, inputs).tokens)(params)

    assert_close(run("xla"), run("flash"))


def test_an_encoder_with_remat_learns_the_same():
    config = SIZES | {"remat": "full"}
    xla, flash = (Encoder(EncoderConfig(**config, attention=name)) for name in ("xla", "flash"))
    params = jax.jit(lambda: xla.init(KEY, tokens())["params"])()
    assert_close(*(moved(model, params, tokens()) for model in (xla, flash)))


def runs_kernel(model, deterministic, collect=()):
    inputs = tokens()
    params = jax.eval_shape(lambda: model.init(KEY, inputs)["params"])

    def call(params):
        return model.apply({"params": params}, inputs, deterministic, collect)

    return "pallas_call" in str(jax.make_jaxpr(call)(params))


@pytest.mark.parametrize("make", [Encoder, Multiway])
def test_which_calls_run_the_kernel(monkeypatch, make):
    config = {Encoder: EncoderConfig, Multiway: MultiwayConfig}[make]
    model = make(config(**SIZES, attention="flash"))
    assert runs_kernel(model, False) and runs_kernel(model, True)
    assert not runs_kernel(model, True, ("weights",))
    monkeypatch.setattr(attention_kernels, "platform", lambda: "cpu")
    assert not runs_kernel(model, True)
    with pytest.raises(UserError, match="attention='flash' runs on tpus alone and this is for cpu"):
        runs_kernel(model, False)
