"""One encoder over a text's tokens and its image's (ViLT), and the heads on it."""

import jax.numpy as jnp
from flax import linen as nn

from bivl.models.layers import ACTIVATIONS, LayerNorm, Projection, Vector
from bivl.models.transformer import Encoder, EncoderConfig


class WordsHead(nn.Module):
    """BERT's: [..., D] -> logits [..., V], float32, by Linear(D, D), activation, LayerNorm and a
    map with a bias of its own; of that map the kernel is one too, or `table` [V, D], the words'.
    """

    words: int
    encoder: EncoderConfig

    @nn.compact
    def __call__(self, x, table=None):
        c = self.encoder
        options = {"kernel_init": nn.initializers.normal(0.02), "dtype": c.dtype}
        x = Projection((c.width,), ("embed", None), name="dense", **options)(x)
        x = LayerNorm(c.eps, c.dtype, name="norm")(ACTIVATIONS[c.activation](x))
        if table is None:
            options |= {"use_bias": False, "name": "decoder"}
            x = Projection((self.words,), ("embed", None), **options)(x)
        else:
            x = jnp.einsum("...D,VD->...V", x, table.astype(x.dtype))
        return x.astype(jnp.float32) + Vector((self.words,), (None,), name="bias")()


class SingleStream(nn.Module):
    """Embedding, encoder, pooler and heads.

    embed: has besides its tokens `table()`, that of the words [V, D]. pooler: Linear(D, D) and tanh
    on the first token, or else the token itself. words: classes of masked words, 0 for no such
    head; `tied`, its last kernel is the table of words. matching: whether there is a head that says
    if a text belongs to its image.
    """

    embed: nn.Module
    encoder: EncoderConfig
    pooler: bool = True
    words: int = 0
    tied: bool = False
    matching: bool = False

    def setup(self):
        c = self.encoder
        self.trunk = Encoder(c)
        options = {"kernel_init": nn.initializers.normal(0.02), "dtype": c.dtype}
        if self.pooler:
            self.pool = Projection((c.width,), ("embed", None), **options)
        if self.words:
            self.mlm_head = WordsHead(self.words, c)
        if self.matching:
            self.itm_head = Projection((2,), ("embed", None), **options)

    def encode(self, batch, masked: bool = False, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded, pooled [B, D]) of pairs."""
        tokens = self.embed(batch, masked, deterministic)
        encoded = self.trunk(tokens, deterministic, collect)
        first = encoded.tokens[:, 0]
        return tokens, encoded, jnp.tanh(self.pool(first)) if self.pooler else first

    def name_words(self, x):
        """[..., D] -> logits [..., V], float32."""
        return self.mlm_head(x, self.embed.table() if self.tied else None)

    def match(self, pooled):
        """[B, D] -> logits [B, 2], float32: not a pair, a pair."""
        return self.itm_head(pooled).astype(jnp.float32)

    def __call__(self, batch):
        """Reads every parameter, for initialisation alone."""
        _, encoded, pooled = self.encode(batch)
        outputs = [pooled]
        outputs += [self.name_words(encoded.tokens[:, :1])] if self.words else []
        outputs += [self.match(pooled)] if self.matching else []
        return outputs
