"""data2vec 2.0's decoders: a few convolutions over visible tokens and noise."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.models.layers import Projection, gelu, partitioned, torch_uniform


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """`width` channels inside, `depth` layers of `kernel` in `groups`; `residual` adds each layer's
    input to its output where the widths agree; `projection_layers` 1 or 2 maps back to D."""

    width: int
    depth: int
    kernel: int
    groups: int
    residual: bool = True
    projection_layers: int = 1
    dropout: float = 0.0
    noise: float = 0.01


def _convolve(x, kernel, groups: int):
    """Same-size convolution of [B, ..., C] with [k, ..., C / groups, width] by XLA's own."""
    n, k = x.ndim - 2, kernel.shape[0]
    axes = "HW"[-n:]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (1,) * n,
        [(k // 2, k - 1 - k // 2)] * n,
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=groups,
    )


def _convolve_by_matmul(x, kernel, groups: int):
    """The same, one matmul a group over shifted copies: XLA has no fast grouped one on the CPU."""
    n, k, (B, *sizes, C) = x.ndim - 2, kernel.shape[0], x.shape
    padded = jnp.pad(x, ((0, 0), *[(k // 2, k - 1 - k // 2)] * n, (0, 0)))
    windows = [
        padded[(slice(None), *(slice(o, o + size) for o, size in zip(offset, sizes, strict=True)))]
        for offset in np.ndindex(*[k] * n)
    ]
    columns = jnp.stack(windows).reshape(k**n, -1, groups, C // groups)
    kernel = kernel.reshape(k**n, C // groups, groups, -1)
    y = jnp.einsum("tngc,tcgd->ngd", columns, kernel)
    return y.reshape(B, *sizes, -1)


class Convolution(nn.Module):
    """Same-size convolution over the n axes between batch and channels, PyTorch's default init.

    Kernel [k, ..., C / groups, width]; padding k // 2 before, k - 1 - k // 2 behind.
    """

    width: int
    kernel: int
    groups: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        n, channels = x.ndim - 2, x.shape[-1]
        shape = (*[self.kernel] * n, channels // self.groups, self.width)
        init = torch_uniform(math.prod(shape[:-1]))
        kernel = self.param("kernel", partitioned(init, (*[None] * n, None, "embed")), shape)
        bias = self.param("bias", partitioned(init, ("embed",)), (self.width,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        by_matmul = functools.partial(_convolve_by_matmul, groups=self.groups)
        by_xla = functools.partial(_convolve, groups=self.groups)
        y = jax.lax.platform_dependent(x, kernel, cpu=by_matmul, default=by_xla)
        return y + bias.astype(self.dtype)


def normalize_channels(x, eps: float = 1e-5):
    """LayerNorm without affine over the last axis, in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)
    return (centred * rstd).astype(x.dtype)


class Decoder(nn.Module):
    """Kept tokens [B, K, D] and where they stand -> predictions [B, L, D] at every position.

    Each layer is convolution, LayerNorm without affine, GELU (fairseq
    `models/modalities/modules.py`, Decoder1d and Decoder2d). Masked places hold fresh noise
    N(0, noise^2), no learned token. No positions are added: zero padding tells where the rim is.
    """

    config: DecoderConfig
    grid: tuple[int, ...]
    dtype: str = "float32"

    @nn.compact
    def __call__(self, kept, keep, deterministic: bool):
        """keep: int [B, K], the places of `kept` in the flat grid."""
        c, (B, _, D), length = self.config, kept.shape, math.prod(self.grid)
        kept = nn.Dropout(c.dropout)(kept, deterministic).astype(self.dtype)
        noise = c.noise * jax.random.normal(self.make_rng("dropout"), (B, length, D))
        x = noise.astype(self.dtype).at[jnp.arange(B)[:, None], keep].set(kept)
        x = x.reshape(B, *self.grid, D)
        for i in range(c.depth):
            y = Convolution(c.width, c.kernel, c.groups, self.dtype, name=f"conv{i}")(x)
            y = gelu(normalize_channels(y))
            x = x + y if c.residual and x.shape[-1] == y.shape[-1] else y
        x = x.reshape(B, length, c.width)
        if c.projection_layers == 1:
            init = torch_uniform(c.width)
            options = {"kernel_init": init, "bias_init": init, "dtype": self.dtype}
            return Projection((D,), ("embed", None), name="projection", **options)(x)
        options = {"kernel_init": nn.initializers.normal(0.02), "dtype": self.dtype}
        x = gelu(Projection((2 * c.width,), ("embed", "mlp"), name="fc", **options)(x))
        return Projection((D,), ("mlp", "embed"), name="projection", **options)(x)
