"""The layers everything is built of: the only file that writes logical axes.

Shape letters, here and everywhere: B batch, M masks per example, L tokens, K kept tokens, D width,
H heads, F hidden (mlp_dim), V vocabulary, N layers. A parameter's tuple of axes is also its shape
comment. Parameters are float32; `dtype` is what a layer computes in.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

Init = Callable[..., jax.Array]

zeros = nn.initializers.zeros
ones = nn.initializers.ones


def truncated_normal(std: float, cut: float = 1.0) -> Init:
    """N(0, std^2) cut at +-cut stds. BEiT cuts at one std: `trunc_normal_(a=-s, b=s)`."""

    def init(key, shape, dtype=jnp.float32):
        return std * jax.random.truncated_normal(key, -cut, cut, shape, dtype)

    return init


def xavier_uniform(key, shape, dtype=jnp.float32):
    """U(-1, 1) sqrt(6 / (inputs + outputs)) of kernels [D, F], heads' [H, d, D] and fused q, k, v
    [D, 3, H, d], each of which counts as a matrix of its own."""
    cut = 2 if len(shape) == 3 else 1
    inputs, outputs = shape[:cut], shape[max(cut, len(shape) - 2) :]
    bound = math.sqrt(6 / (math.prod(inputs) + math.prod(outputs)))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def torch_uniform(fan_in: int) -> Init:
    """PyTorch's default of convolutions and linear maps, biases too: U(-1, 1) / sqrt(fan_in)."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

    return init


def torch_kernel(key, shape, dtype=jnp.float32):
    """PyTorch's defaults of kernels [D, F] and heads' [H, d, D], as `torch_uniform`, and of fused
    q, k, v [D, 3, H, d], Xavier uniform of one matrix (`nn.MultiheadAttention`)."""
    if len(shape) == 4:
        bound = math.sqrt(6 / (shape[0] + math.prod(shape[1:])))
        return jax.random.uniform(key, shape, dtype, -bound, bound)
    return torch_uniform(math.prod(shape[:-1]))(key, shape, dtype)


def partitioned(init: Init, axes: tuple) -> Callable:
    """`init` whose result carries its logical axes."""
    return nn.with_logical_partitioning(init, axes)


def constrain_tokens(x):
    """Pins [B, L, D] activations to the batch axes of the mesh (nothing happens without a mesh)."""
    return nn.with_logical_constraint(x, ("batch", "length", "act_embed"))


def spread(vector, like):
    """A float32 parameter, broadcast to the shape of `like` and in its dtype.

    In this order, as its gradient is then a sum in float32: a sum in bfloat16 of as many rows as a
    batch has is off by several percent.
    """
    return jnp.broadcast_to(vector, like.shape).astype(like.dtype)


def gather_kept(x, keep):
    """Tokens [B, L, D] at keep int [B, M, K] -> [B M, K, D], an example's M clones together."""
    B, M, K = keep.shape
    kept = jnp.take_along_axis(x, keep.reshape(B, M * K, 1), axis=1)
    return kept.reshape(B * M, K, x.shape[-1])


class Projection(nn.Module):
    """Linear map of the last axes of x onto `outputs`, with float32 parameters.

    axes: one logical name per kernel axis, inputs first; how many inputs there are follows from it.
    """

    outputs: tuple[int, ...]
    axes: tuple[str | None, ...]
    use_bias: bool = True
    kernel_init: Init = truncated_normal(0.02)
    bias_init: Init = zeros
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        num_inputs = len(self.axes) - len(self.outputs)
        shape = (*x.shape[-num_inputs:], *self.outputs)
        kernel = self.param("kernel", partitioned(self.kernel_init, self.axes), shape)
        x = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), num_inputs)
        if self.use_bias:
            bias = self.param(
                "bias", partitioned(self.bias_init, self.axes[num_inputs:]), self.outputs
            )
            x = x + spread(bias, x)
        return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x, scale, bias, eps):
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, statistics in float32.

    The backward pass is written out: XLA's own recomputes the statistics inside every fusion.
    """
    return _layer_norm_fwd(x, scale, bias, eps)[0]


def _layer_norm_fwd(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True)
    centred = wide - mean
    rstd = jax.lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    y = centred * rstd * scale + bias
    return y.astype(x.dtype), (x, mean, rstd, scale)


def _layer_norm_bwd(eps, saved, dy):
    del eps
    x, mean, rstd, scale = saved
    normed = (x.astype(jnp.float32) - mean) * rstd
    dy = dy.astype(jnp.float32)
    rows = tuple(range(dy.ndim - 1))
    dscale, dbias = jnp.sum(dy * normed, rows), jnp.sum(dy, rows)
    dn = dy * scale
    along = jnp.mean(dn * normed, -1, keepdims=True)
    dx = (dn - jnp.mean(dn, -1, keepdims=True) - normed * along) * rstd
    return dx.astype(x.dtype), dscale, dbias


layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with scale and bias; output in `dtype`."""

    eps: float = 1e-6
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", partitioned(ones, (None,)), x.shape[-1:])
        bias = self.param("bias", partitioned(zeros, (None,)), x.shape[-1:])
        return layer_norm(x, scale, bias, self.eps).astype(self.dtype)


class Vector(nn.Module):
    """A learned array of its own: CLS token, mask token, layer scale, position table."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init = zeros

    @nn.compact
    def __call__(self):
        return self.param("value", partitioned(self.init, self.axes), self.shape)


class Embedding(nn.Module):
    """Table [V, D] and its lookup: int ids [...] -> [..., D].

    Only the width is sharded: vocabularies are as odd as RoBERTa's 50,265.
    """

    size: int
    width: int
    init: Init = truncated_normal(0.02)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, ids):
        table = self.param(
            "table", partitioned(self.init, (None, "embed")), (self.size, self.width)
        )
        # Gathered, as FSDP does with weights: else XLA gathers the rows of the whole batch.
        table = nn.with_logical_constraint(table, (None, None))
        return jnp.take(table, ids, axis=0).astype(self.dtype)


class PatchEmbed(nn.Module):
    """Stride-p convolution as one matmul: images [B, h p, w p, C] -> [B, h w, D].

    Kernel axes (patch row, patch column, channel, D) are those of the convolution it replaces.
    """

    patch_size: int
    width: int
    kernel_init: Init = truncated_normal(0.02)
    bias_init: Init = zeros
    dtype: str = "float32"
    use_bias: bool = True

    @nn.compact
    def __call__(self, images):
        B, height, width, C = images.shape
        p = self.patch_size
        x = images.reshape(B, height // p, p, width // p, p, C).swapaxes(2, 3)
        x = x.reshape(B, (height // p) * (width // p), p, p, C)
        axes = (None, None, None, "embed")
        options = {"kernel_init": self.kernel_init, "bias_init": self.bias_init}
        options |= {"dtype": self.dtype, "use_bias": self.use_bias}
        return Projection((self.width,), axes, name="projection", **options)(x)


@jax.checkpoint
def gelu(x):
    """Exact (erf) GELU, in float32, as 1 + erf cancels (torchscale `feedforward_network.py`).

    The backward pass computes erf again: cheaper than to keep it.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def quick_gelu(x):
    """x sigmoid(1.702 x), which CLIP has in the place of GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": gelu, "quick_gelu": quick_gelu}


class Mlp(nn.Module):
    """D -> F -> D with exact GELU, or another of ACTIVATIONS; `inner_norm` puts a LayerNorm before
    the second map (sub-LN)."""

    hidden: int
    inner_norm: bool = False
    eps: float = 1e-6
    dropout: float = 0.0
    dtype: str = "float32"
    kernel_init: Init = truncated_normal(0.02)
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x, deterministic: bool):
        width, options = x.shape[-1], {"kernel_init": self.kernel_init, "dtype": self.dtype}
        x = Projection((self.hidden,), ("embed", "mlp"), name="fc1", **options)(x)
        x = ACTIVATIONS[self.activation](x)
        if self.inner_norm:
            x = LayerNorm(self.eps, self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic)
        return Projection((width,), ("mlp", "embed"), name="fc2", **options)(x)


def drop_path(x, rate, key):
    """Stochastic depth: drops examples of a residual branch [B, ...]; `rate` may be traced."""
    keep = jax.random.bernoulli(key, 1 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1 - rate).astype(x.dtype), 0).astype(x.dtype)
