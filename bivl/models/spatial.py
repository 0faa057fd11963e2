"""Layers of maps [B, H, W, C]: convolutions over them, and batch normalisation."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.models.layers import ones, partitioned, zeros

STATISTICS = "statistics"  # the collection of what batch norms have seen


def fan_out(count: int):
    """N(0, 2 / count): kernels' initialiser of EfficientNet, `count` values read each input."""
    return nn.initializers.normal(math.sqrt(2 / count))


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, computed in float32.

    Inference takes the running statistics, training the whole batch's, on all devices together, and
    moves the running ones towards them: that collection must then be mutable.
    """

    eps: float
    decay: float

    @nn.compact
    def __call__(self, x, deterministic: bool):
        shape, wide = x.shape[-1:], x.astype(jnp.float32)
        scale = self.param("scale", partitioned(ones, (None,)), shape)
        bias = self.param("bias", partitioned(zeros, (None,)), shape)
        names = (("mean", jnp.zeros), ("variance", jnp.ones))
        running = [self.variable(STATISTICS, name, init, shape) for name, init in names]
        mean, variance = (seen.value for seen in running)
        if not deterministic:
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            variance = jnp.square(wide - mean).mean(axes)
            for seen, new in zip(running, (mean, variance), strict=True):
                seen.value = self.decay * seen.value + (1 - self.decay) * jax.lax.stop_gradient(new)
        gain = scale * jax.lax.rsqrt(variance + self.eps)
        return ((wide - mean) * gain + bias).astype(x.dtype)


def _depthwise_by_xla(x, kernel, stride: int):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def _depthwise_by_shifts(x, kernel, stride: int):
    """The same as a sum over shifted copies: XLA's grouped convolutions are slow on the CPU."""
    k, (height, width) = kernel.shape[0], x.shape[1:3]
    y = jnp.zeros((), x.dtype)
    for i in range(k):
        for j in range(k):
            rows = slice(i, i + height - k + 1, stride)
            columns = slice(j, j + width - k + 1, stride)
            y = y + x[:, rows, columns] * kernel[i, j, 0]
    return y


class SpatialConvolution(nn.Module):
    """Convolution [B, H, W, C] -> [B, H / stride, W / stride, width] by a kernel [k, k, C, width];
    `width` 0: each channel by its own, [k, k, 1, C]. `shift`: see Bottleneck."""

    kernel: int
    stride: int
    width: int = 0
    shift: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        k, channels = self.kernel, x.shape[-1]
        before = k // 2 - (self.stride == 2 and self.shift)
        x = jnp.pad(x, ((0, 0), (before, k // 2), (before, k // 2), (0, 0)))
        shape = (k, k, channels, self.width) if self.width else (k, k, 1, channels)
        init = partitioned(fan_out(k * k * max(self.width, 1)), (None,) * 4)
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        if self.width:
            numbers = ("NHWC", "HWIO", "NHWC")
            strides = (self.stride, self.stride)
            return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", None, None, numbers)
        ways = (_depthwise_by_shifts, _depthwise_by_xla)
        cpu, default = (functools.partial(f, stride=self.stride) for f in ways)
        return jax.lax.platform_dependent(x, kernel, cpu=cpu, default=default)
