"""Multi-head self-attention."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.models import attention_kernels
from bivl.models.layers import (
    Init,
    LayerNorm,
    Projection,
    Vector,
    spread,
    truncated_normal,
    zeros,
)

BIASES = {"qkv": (True, True, True), "qv": (True, False, True), "none": (False, False, False)}


def padding_bias(padding, dtype=jnp.float32):
    """bool [B, L], True = pad -> additive bias [B, 1, 1, L] that hides padded keys.

    Half the lowest finite number, not -inf: a row with nothing but padding must not become NaN,
    nor may a further bias overflow.
    """
    return jnp.where(padding[:, None, None, :], jnp.finfo(dtype).min / 2, 0).astype(dtype)


def causal_bias(length: int, dtype=jnp.float32):
    """Additive bias [1, 1, L, L] that hides from every token those behind it."""
    seen = jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(seen, 0, jnp.finfo(dtype).min / 2).astype(dtype)[None, None]


def hidden(kernel: str, bias, padding):
    """What an encoder hands to the `attend` of each of its layers, (bias, padding): for `xla` their
    sum, made once; kernels take padding as it is."""
    return (bias, padding) if kernel != "xla" else (_with_padding(bias, padding), None)


def _with_padding(bias, padding):
    if padding is None:
        return bias
    added = padding_bias(padding)
    return added if bias is None else bias + added


def attend(q, k, v, bias=None, padding=None, dropout: float = 0.0, key=None, kernel: str = "xla"):
    """softmax(q k^T / sqrt(d) + bias) v for q, k, v [B, H, L, d]; returns (out, weights).

    bias: anything that broadcasts to [B, H, L, L]; padding: bool [B, L], True = pad, hidden from
    all. Softmax in float32. The division by the softmax's sum comes after the product with v, where
    there is d / L times as much to divide; `weights` are the normalised [B, H, L, L], free unless
    somebody reads them. kernel: one of attention_kernels.py, as its `chosen` says, which has no
    dropout and whose weights are None.
    """
    if kernel != "xla":
        return attention_kernels.attend(kernel, q, k, v, bias, padding), None
    bias = _with_padding(bias, padding)
    logits = jnp.einsum("BHQd,BHKd->BHQK", q * q.shape[-1] ** -0.5, k)
    logits = logits.astype(jnp.float32)
    if bias is not None:
        logits = logits + bias
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    exps = jnp.exp(logits - top)
    total = exps.sum(-1, keepdims=True)
    weights = exps / total
    if dropout:
        keep = jax.random.bernoulli(key, 1 - dropout, exps.shape)
        exps = jnp.where(keep, exps, 0) / (1 - dropout)
    out = jnp.einsum("BHQK,BHKd->BHQd", exps.astype(v.dtype), v)
    return (out / total).astype(v.dtype), weights


class Attention(nn.Module):
    """Self-attention [B, L, D] -> [B, L, D] with fused q, k, v.

    bias: which of q, k, v have one: `qkv`, `qv` (BEiT: keys have none) or `none`.
    inner_norm: LayerNorm before the output projection (sub-LN, Magneto).
    `heads`, `attend` and `merge` are its three steps, for tokens that attend to each other but have
    parameters of their own (models/multiway.py).
    """

    width: int
    num_heads: int
    bias: str = "qkv"
    inner_norm: bool = False
    eps: float = 1e-6
    dtype: str = "float32"
    kernel_init: Init = truncated_normal(0.02)

    def setup(self):
        D, H = self.width, self.num_heads
        options = {"kernel_init": self.kernel_init, "dtype": self.dtype}
        axes = ("embed", None, "heads", None)
        self.qkv = Projection((3, H, D // H), axes, use_bias=False, **options)
        for name, used in zip("qkv", BIASES[self.bias], strict=True):
            vector = Vector((H, D // H), ("heads", None), zeros) if used else None
            setattr(self, f"{name}_bias", vector)
        self.norm = LayerNorm(self.eps, self.dtype) if self.inner_norm else None
        self.out = Projection((D,), ("heads", None, "embed"), **options)

    def heads(self, x):
        """[B, L, D] -> q, k, v, each [B, H, L, d]."""
        qkv = self.qkv(x).transpose(2, 0, 3, 1, 4)  # [3, B, H, L, d]
        offsets = self.q_bias, self.k_bias, self.v_bias
        return tuple(
            x if b is None else x + spread(b()[:, None, :], x)
            for x, b in zip(qkv, offsets, strict=True)
        )

    def merge(self, x):
        """[B, H, L, d] -> [B, L, D]."""
        B, H, L, d = x.shape
        x = x.transpose(0, 2, 1, 3)
        if self.norm is not None:
            x = self.norm(x.reshape(B, L, H * d)).reshape(B, L, H, d)
        return self.out(x)
