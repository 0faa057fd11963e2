"""data2vec 2.0: many masks of one example share its targets; the student sees only kept tokens.

The teacher and the feature encoder run once an example, the student once a mask, over the kept
tokens alone; a small convolutional decoder fills in the rest. Paper: arXiv 2212.07525; authority:
fairseq `examples/data2vec/models/data2vec2.py` and `config/v2/`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.objective import Objective
from bivl.models.decoders import Decoder, DecoderConfig
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import distillation


class Data2Vec2(nn.Module):
    """Embed, encoder and decoder; the teacher is the same module without its decoder."""

    embed: nn.Module
    encoder: EncoderConfig
    decoding: DecoderConfig
    grid: tuple[int, ...]

    def setup(self):
        self.trunk = Encoder(self.encoder)
        self.decoder = Decoder(self.decoding, self.grid, self.encoder.dtype)

    def encode(self, batch, masked=False, deterministic=True, collect=(), embed_dropout=False):
        """-> (Tokens, Encoded); masked: of the M clones, [B M, special + K, D]."""
        tokens = self.embed(batch, masked, deterministic and not embed_dropout)
        return tokens, self.trunk(tokens, deterministic, collect)

    def __call__(self, batch, deterministic: bool = True):
        """Predictions [B M, L, D] at every position, the special tokens' outputs [B M, s, D]."""
        tokens, encoded = self.encode(batch, True, deterministic)
        x = encoded.tokens
        keep = batch["keep"].reshape(x.shape[0], -1)
        return self.decoder(x[:, tokens.special :], keep, deterministic), x[:, : tokens.special]


def make(config) -> Objective:
    """Reads `modality model decoder top_k_layers target loss ema_* dtype teacher_dtype`."""
    decoding = DecoderConfig(**config.decoder)

    def build(modality, dtype):
        embed, encoder = modality.make_embed(config, dtype), EncoderConfig.of(config.model, dtype)
        return Data2Vec2(embed, encoder, decoding, modality.grid(config))

    def loss(model, params, batch, values, key):
        rngs = {"dropout": key}
        prediction, special = model.apply({"params": params}, batch, deterministic=False, rngs=rngs)
        values = jnp.repeat(values, batch["mask"].shape[1], axis=0)
        mask = batch["mask"].reshape(prediction.shape[:2])
        value, aux = distillation.masked_regression(prediction, values, mask, config)
        if config.loss.cls_weight:
            aux["metrics"]["cls_loss"] = cls_loss(special[:, 0], values, config.loss)
            value = value + config.loss.cls_weight * aux["metrics"]["cls_loss"]
        return value, aux

    def masked(model, params, batch):
        """What the decoder predicts under the first of the masks; masked tokens have no others."""
        first = batch | {name: batch[name][:, :1] for name in ("mask", "keep")}
        rngs = {"dropout": jax.random.key(0)}  # the decoder's noise
        return model.apply({"params": params}, first, rngs=rngs)[0]

    return distillation.objective(config, build, loss, masked, untracked=("decoder",))


def cls_loss(cls, values, config):
    """Mean over rows of the loss between CLS [B M, D] and the mean of the targets [B M, L, D].

    fairseq sums over rows instead, so that its weight 0.01 grows with the batch of a device and M;
    `loss.cls_weight` is the weight of the mean: 0.01 x 16 x 16 = 2.56 as published for ViT-B.
    """
    each = distillation.regression_loss(
        cls, values.mean(1), config.beta, config.reduction, config.scale
    )
    return each.mean()
