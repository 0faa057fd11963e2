"""The switch between attention kernels, what is refused, and cuDNN's programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from bivl.core import sharding
from bivl.core.errors import UserError
from bivl.models import attention_kernels
from bivl.models.attention import attend, hidden
from bivl.models.transformer import EncoderConfig

SIZES = {"width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}


@pytest.fixture
def gpu(monkeypatch):
    """Lets programs for GPUs be lowered where there is none."""
    monkeypatch.setattr(attention_kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)


def given(rows, length, pads=(), dtype="float32"):
    """q, k, v and the gradient of the output, [B, 2, L, 8]; bool [B, L], the last `pads` True."""
    rng = np.random.default_rng(length)
    arrays = [jnp.asarray(rng.standard_normal((rows, 2, length, 8)), dtype) for _ in range(4)]
    pads = np.array([*pads, *[0] * rows][:rows])
    return *arrays, jnp.asarray(np.arange(length) >= length - pads[:, None])


def test_the_mesh_tells_the_platform(monkeypatch):
    assert attention_kernels.platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention_kernels.platform() == "gpu"
    with sharding.use(sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})):
        assert attention_kernels.platform() == "cpu"
        assert jax.jit(lambda: attention_kernels.platform() == "cpu")()


def test_padding_is_summed_once_and_for_xla_alone():
    padding = jnp.zeros((2, 9), bool)
    bias, rest = hidden("xla", jnp.ones((9, 9)), padding)
    assert rest is None and bias.shape == (2, 1, 9, 9)
    assert hidden("xla", None, None) == (None, None)
    assert hidden("flash", None, padding) == (None, padding)


# What is refused


@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_dropout": 0.1}, "config.model.attention_dropout=0.1"),
        ({"positions": "relative"}, "config.model.positions='relative'"),
        ({"alibi": True}, "config.model.alibi=True"),
        ({"width": 4 * 131, "num_heads": 4}, "config.model.width / num_heads=131"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(kernel, change, named):
    with pytest.raises(UserError) as error:
        EncoderConfig.of(SIZES | {"attention": kernel} | change, "bfloat16")
    message = str(error.value)
    assert message.startswith(named) and f"{kernel!r}" in message and "\n" not in message
    assert "attention to 'xla'" in message
    EncoderConfig.of(SIZES | {"attention": "xla"} | change, "bfloat16")


def test_unknown_kernels_are_refused():
    with pytest.raises(UserError, match="config.model.attention='fast' is unknown"):
        EncoderConfig(**SIZES, attention="fast")


def test_a_student_in_float32_is_refused_by_cudnn_and_a_teacher_is_not(gpu):
    assert attention_kernels.chosen("cudnn", "float32", True) == "xla"
    assert attention_kernels.chosen("cudnn", "bfloat16", False) == "cudnn"
    with pytest.raises(UserError, match="config.dtype=float32; use bfloat16"):
        attention_kernels.chosen("cudnn", "float32", False)


# cuDNN, of which only the program can be looked at here


def lowered(inputs, **options):
    """The StableHLO for CUDA of a forward and backward pass."""

    def run(q, k, v, gradient):
        out, pull = jax.vjp(lambda *x: attend(*x, **options, kernel="cudnn")[0], q, k, v)
        return out, *pull(gradient)

    return jax.export.export(
        jax.jit(run),
        platforms=["cuda"],
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call(f"__cudnn$fmha{name}")
            for name in (
                "Softmax",
                "SoftmaxBackward",
                "ScaleBiasSoftmax",
                "ScaleBiasSoftmaxBackward",
            )
        ],
    )(*inputs).mlir_module()


def test_cudnn_takes_even_lengths_as_they_are(gpu):
    text = lowered(given(2, 50, (), "bfloat16")[:4])
    assert "__cudnn$fmhaSoftmax(" in text or '__cudnn$fmhaSoftmax"' in text
    assert "__cudnn$fmhaSoftmaxBackward" in text and "NO_MASK" in text
    assert "tensor<2x50x2x8xbf16>" in text and "tensor<2xi32>" not in text


@pytest.mark.parametrize("length", [13, 197])
def test_cudnn_hides_what_makes_odd_lengths_even(gpu, length):
    text = lowered(given(2, length, (), "bfloat16")[:4])
    assert f"tensor<2x{length + 1}x2x8xbf16>" in text and "PADDING" in text
    assert "__cudnn$fmhaSoftmaxBackward" in text and "NO_MASK" not in text
    assert f"dense<{length}> : tensor<" in text  # how many of them are seen


def test_cudnn_takes_padding_as_lengths(gpu):
    *arrays, padding = given(2, 50, (4,), "bfloat16")
    text = lowered(arrays, padding=padding)
    assert "tensor<2xi32>" in text and "PADDING" in text and "fmhaScaleBias" not in text


def test_cudnn_takes_caption_masks_in_whole_blocks(gpu):
    *arrays, padding = given(2, 13, (4,), "bfloat16")
    text = lowered(arrays, bias=jnp.zeros((13, 13)), padding=padding)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text
    assert "tensor<1x1x128x128xbf16>" in text and "tensor<2x128x2x8xbf16>" in text


def test_a_machine_without_cudnn_is_told(monkeypatch):
    monkeypatch.setattr(attention_kernels, "platform", lambda: "gpu")
    *arrays, _, _ = given(1, 13, (), "bfloat16")
    with pytest.raises(UserError, match="attention='cudnn': cuDNN is not detected; use 'xla'"):
        attend(*arrays, kernel="cudnn")
