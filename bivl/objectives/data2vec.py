"""data2vec 1.0: an EMA teacher sees the whole input, the student regresses its top-K layers.

One file for all modalities; the config names the modality. Authority for vision is
facebookresearch/data2vec_vision (the code behind the published numbers), for text and speech
fairseq's examples/data2vec; paper: arXiv 2202.03555.
"""

import importlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.objective import Objective
from bivl.models.layers import Projection
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import distillation, encoding


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
    distillation.check(config)
    modality = importlib.import_module(f"bivl.modalities.{config.modality}")
    spec = modality.spec(config)

    def build(dtype):
        model = Data2Vec(modality.make_embed(config, dtype), EncoderConfig.of(config.model, dtype))

        def encode(params, batch, collect):
            return model.apply({"params": params}, batch, collect=collect, method="encode")

        return model, encode

    student, encode = build(config.dtype)
    teach = distillation.teacher_targets(build(config.teacher_dtype)[1], config)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        params = student.init(key, batch)["params"]
        return params, jax.tree.map(jnp.copy, params), {}

    def targets(teacher, extras, batch, key):
        values, encoded = teach(teacher, batch)
        return {"values": values, "metrics": distillation.rank_metrics(encoded, values)}

    def loss(params, extras, batch, targets, key):
        rngs = {"dropout": key}
        prediction = student.apply({"params": params}, batch, deterministic=False, rngs=rngs)
        mask = batch["mask"]
        value, aux = distillation.masked_regression(prediction, targets["values"], mask, config)
        return value, aux | {"metrics": aux["metrics"] | targets["metrics"]}

    own_targets = distillation.teacher_targets(encode, config)
    predict = encoding.predictions(encode, modality, config) | {
        "targets": lambda params, extras, batch: own_targets(params, batch)[0]
    }
    return Objective(
        spec,
        init,
        targets,
        loss,
        distillation.teacher_update(config),
        predict,
        modality.train_ops(config),
        modality.eval_ops(config),
        modality.preprocess(config),
    )
