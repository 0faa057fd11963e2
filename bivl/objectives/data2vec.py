"""data2vec 1.0: an EMA teacher sees the whole input, the student regresses its top-K layers.

One file for all modalities; the config names the modality. Authority for vision is
facebookresearch/data2vec_vision (the code behind the published numbers), for text and speech
fairseq's examples/data2vec; paper: arXiv 2202.03555.
"""

from flax import linen as nn

from bivl.core.objective import Objective
from bivl.models.layers import Projection
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import distillation


class Data2Vec(nn.Module):
    """Embed, encoder and regression head; student and teacher are the same module."""

    embed: nn.Module
    encoder: EncoderConfig

    def setup(self):
        self.trunk = Encoder(self.encoder)
        axes = ("embed", None)
        self.head = Projection((self.encoder.width,), axes, dtype=self.encoder.dtype)

    def encode(self, batch, masked: bool = False, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded)."""
        tokens = self.embed(batch, masked)
        return tokens, self.trunk(tokens, deterministic, collect)

    def __call__(self, batch, deterministic: bool = True):
        """Predictions [B, L, D] at every content token of the masked input."""
        tokens, encoded = self.encode(batch, True, deterministic)
        return self.head(encoded.tokens[:, tokens.special :])


def make(config) -> Objective:
    """Reads `modality model top_k_layers target loss ema_* dtype teacher_dtype`."""

    def build(modality, dtype):
        return Data2Vec(modality.make_embed(config, dtype), EncoderConfig.of(config.model, dtype))

    def loss(model, params, batch, values, key):
        rngs = {"dropout": key}
        prediction = model.apply({"params": params}, batch, deterministic=False, rngs=rngs)
        return distillation.masked_regression(prediction, values, batch["mask"], config)

    return distillation.objective(config, build, loss)
