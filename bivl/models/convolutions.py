"""Convolutions over one or more axes, and what speech is read with: extractor and positions."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.models.layers import Init, LayerNorm, gelu, partitioned, spread, torch_uniform


def _by_xla(x, kernel, groups: int, stride: int, padding):
    """Convolution of [B, ..., C] with [k, ..., C / groups, width] by XLA's own."""
    axes = "HW"[-(x.ndim - 2) :]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * len(axes),
        padding,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )


def _groups_first(x, groups: int):
    """[..., C] -> [groups, ..., C / groups]."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], groups, -1), -2, 0)


def _groups_last(x):
    x = jnp.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _by_groups(x, kernel, groups: int, padding):
    """The same with stride 1, one group after the other: XLA's grouped ones are slow on the CPU.

    So are its gradients of kernels, which are matmuls here: the input, shifted, by the output's
    gradient.
    """
    return _by_groups_fwd(x, kernel, groups, padding)[0]


def _by_groups_fwd(x, kernel, groups, padding):
    parts = _groups_first(x, groups), _groups_first(kernel, groups)
    y = jax.lax.map(lambda part: _by_xla(part[0], part[1], 1, 1, padding), parts)
    return _groups_last(y), parts


def _by_groups_bwd(groups, padding, parts, dy):
    k, n = parts[1].shape[1], len(padding)
    behind = [(k - 1 - before, k - 1 - after) for before, after in padding]

    def one(part):
        x, kernel, dy = part
        mirrored = jnp.flip(kernel, range(n)).swapaxes(-1, -2)
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        sizes = (x.shape[0], *dy.shape[1:-1], x.shape[-1])
        windows = (jax.lax.dynamic_slice(x, (0, *at, 0), sizes) for at in np.ndindex(*[k] * n))
        flat = dy.reshape(-1, dy.shape[-1])
        products = [window.reshape(-1, x.shape[-1]).T @ flat for window in windows]
        return _by_xla(dy, mirrored, 1, 1, behind), jnp.stack(products).reshape(kernel.shape)

    return tuple(map(_groups_last, jax.lax.map(one, (*parts, _groups_first(dy, groups)))))


_by_groups.defvjp(_by_groups_fwd, _by_groups_bwd)


class Convolution(nn.Module):
    """Convolution over the n axes between batch and channels, PyTorch's default init.

    Kernel [k, ..., C / groups, width]. `same` pads k // 2 before and k - 1 - k // 2 behind, so that
    stride 1 keeps the size; without, L -> floor((L - k) / stride) + 1.
    """

    width: int
    kernel: int
    groups: int = 1
    stride: int = 1
    same: bool = True
    use_bias: bool = True
    kernel_init: Init | None = None
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        n, k, channels = x.ndim - 2, self.kernel, x.shape[-1]
        shape = (*[k] * n, channels // self.groups, self.width)
        init = torch_uniform(math.prod(shape[:-1]))
        axes = (*[None] * n, None, "embed")
        kernel = self.param("kernel", partitioned(self.kernel_init or init, axes), shape)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        padding = ((k // 2, k - 1 - k // 2) if self.same else (0, 0),) * n

        def by_xla(x, kernel):
            return _by_xla(x, kernel, self.groups, self.stride, padding)

        def by_groups(x, kernel):
            return _by_groups(x, kernel, self.groups, padding)

        on_cpu = by_groups if self.groups > 1 and self.stride == 1 else by_xla
        y = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=by_xla)
        if not self.use_bias:
            return y
        return y + spread(self.param("bias", partitioned(init, ("embed",)), (self.width,)), y)


def normalize_channels(x, eps: float = 1e-5):
    """LayerNorm without affine over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (centred * rstd).astype(x.dtype)


def output_length(length, kernels, strides):
    """How many frames a stack of unpadded convolutions makes of `length` samples (or an array)."""
    for k, stride in zip(kernels, strides, strict=True):
        length = (length - k) // stride + 1
    return length


class Extractor(nn.Module):
    """wav2vec 2.0's feature extractor: waveform [B, T] -> frames [B, L, width].

    Each layer is an unpadded convolution without bias, LayerNorm with affine over channels (eps
    1e-5) and GELU (fairseq `models/wav2vec/wav2vec2.py`, extractor_mode `layer_norm`).
    """

    width: int
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, waveform):
        x = waveform[..., None].astype(self.dtype)
        options = {"same": False, "use_bias": False, "dtype": self.dtype}
        options["kernel_init"] = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        for i, (k, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
            x = Convolution(self.width, k, stride=stride, name=f"conv{i}", **options)(x)
            x = gelu(LayerNorm(1e-5, self.dtype, name=f"norm{i}")(x))
        return x


class ConvolutionalPositions(nn.Module):
    """data2vec's positions of speech: what a stack of grouped convolutions makes of x [B, L, D].

    Each layer is convolution, LayerNorm without affine and GELU; the caller adds the result to x
    (fairseq `models/wav2vec/wav2vec2.py`, `make_conv_pos` with pos_conv_depth 5).
    """

    depth: int
    kernel: int
    groups: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        options = {"kernel": self.kernel, "groups": self.groups, "dtype": self.dtype}
        for i in range(self.depth):
            x = Convolution(x.shape[-1], name=f"conv{i}", **options)(x)
            x = gelu(normalize_channels(x))
        return x
