"""data2vec 2.0's decoders: a few convolutions over visible tokens and noise."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.models.convolutions import Convolution, normalize_channels
from bivl.models.layers import Projection, gelu, torch_uniform


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
            y = Convolution(c.width, c.kernel, c.groups, dtype=self.dtype, name=f"conv{i}")(x)
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
