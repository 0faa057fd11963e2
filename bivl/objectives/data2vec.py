"""data2vec 1.0: an EMA teacher sees the whole input, the student regresses its top-K layers.

One file for all modalities; the config names the modality. Authority for vision is
facebookresearch/data2vec_vision (the code behind the published numbers), for text and speech
fairseq's examples/data2vec; paper: arXiv 2202.03555.
"""

from flax import linen as nn

from bivl.core.config import choice
from bivl.core.objective import Objective
from bivl.models.heads import HEAD_INITS, RegressionHead
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import distillation


class Data2Vec(nn.Module):
    """Embed, encoder and regression head; student and teacher are the same module."""

    embed: nn.Module
    encoder: EncoderConfig
    head_layers: int = 1
    head_init: str = "truncated"

    def setup(self):
        self.trunk = Encoder(self.encoder)
        self.head = RegressionHead(self.head_layers, self.head_init, self.encoder.dtype)

    def encode(self, batch, masked=False, deterministic=True, collect=(), embed_dropout=False):
        """-> (Tokens, Encoded); `embed_dropout`: dropout in the embedding alone."""
        tokens = self.embed(batch, masked, deterministic and not embed_dropout)
        return tokens, self.trunk(tokens, deterministic, collect)

    def __call__(self, batch, deterministic: bool = True):
        """Predictions [B, L, D] at every content token of the masked input."""
        tokens, encoded = self.encode(batch, True, deterministic)
        return self.head(encoded.tokens[:, tokens.special :])


def make(config) -> Objective:
    """Reads `modality model head top_k_layers target loss ema_* dtype teacher_dtype`."""
    layers = choice("head.layers", config.head.layers, (1, 2))
    init = choice("head.init", config.head.init, HEAD_INITS)

    def build(modality, dtype):
        encoder = EncoderConfig.of(config.model, dtype)
        return Data2Vec(modality.make_embed(config, dtype), encoder, layers, init)

    def loss(model, params, batch, values, key):
        rngs = {"dropout": key}
        prediction = model.apply({"params": params}, batch, deterministic=False, rngs=rngs)
        return distillation.masked_regression(prediction, values, batch["mask"], config)

    def masked(model, params, batch):
        tokens, encoded = model.apply({"params": params}, batch, True, method="encode")
        return encoded.tokens[:, tokens.special :]

    return distillation.objective(config, build, loss, masked)
