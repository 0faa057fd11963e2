"""data2vec 2.0: many masks of one example share its targets; the student sees only kept tokens.

The teacher and the feature encoder run once an example, the student once a mask, over the kept
tokens alone; a small convolutional decoder fills in the rest. Paper: arXiv 2212.07525; authority:
fairseq `examples/data2vec/models/data2vec2.py` and `config/v2/`.
"""

import importlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.objective import Objective
from bivl.models.decoders import Decoder, DecoderConfig
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import distillation, encoding


class Data2Vec2(nn.Module):
    """Embed, encoder and decoder; the teacher is the same module without its decoder."""

    embed: nn.Module
    encoder: EncoderConfig
    decoding: DecoderConfig
    grid: tuple[int, ...]

    def setup(self):
        self.trunk = Encoder(self.encoder)
        self.decoder = Decoder(self.decoding, self.grid, self.encoder.dtype)

    def encode(self, batch, masked: bool = False, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded); masked: of the M clones, [B M, special + K, D]."""
        tokens = self.embed(batch, masked)
        return tokens, self.trunk(tokens, deterministic, collect)

    def __call__(self, batch, deterministic: bool = True):
        """Predictions [B M, L, D] at every position, the special tokens' outputs [B M, s, D]."""
        tokens, encoded = self.encode(batch, True, deterministic)
        x = encoded.tokens
        keep = batch["keep"].reshape(x.shape[0], -1)
        return self.decoder(x[:, tokens.special :], keep, deterministic), x[:, : tokens.special]


def make(config) -> Objective:
    """Reads `modality model decoder top_k_layers target loss ema_* dtype teacher_dtype`."""
    distillation.check(config)
    modality = importlib.import_module(f"bivl.modalities.{config.modality}")
    spec, grid = modality.spec(config), modality.grid(config)
    decoding = DecoderConfig(**config.decoder)

    def build(dtype):
        embed, encoder = modality.make_embed(config, dtype), EncoderConfig.of(config.model, dtype)
        model = Data2Vec2(embed, encoder, decoding, grid)

        def encode(params, batch, collect):
            return model.apply({"params": params}, batch, collect=collect, method="encode")

        return model, encode

    student, encode = build(config.dtype)
    teach = distillation.teacher_targets(build(config.teacher_dtype)[1], config)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        params = student.init({"params": key, "dropout": key}, batch)["params"]
        tracked = {name: tree for name, tree in params.items() if name != "decoder"}
        return params, jax.tree.map(jnp.copy, tracked), {}

    def targets(teacher, extras, batch, key):
        values, encoded = teach(teacher, batch)
        return {"values": values, "metrics": distillation.rank_metrics(encoded, values)}

    def loss(params, extras, batch, targets, key):
        rngs = {"dropout": key}
        prediction, special = student.apply(
            {"params": params}, batch, deterministic=False, rngs=rngs
        )
        clones = batch["mask"].shape[1]
        values = jnp.repeat(targets["values"], clones, axis=0)
        mask = batch["mask"].reshape(prediction.shape[:2])
        value, aux = distillation.masked_regression(prediction, values, mask, config)
        metrics = aux["metrics"] | targets["metrics"]
        if config.loss.cls_weight:
            metrics["cls_loss"] = cls_loss(special[:, 0], values, config.loss)
            value = value + config.loss.cls_weight * metrics["cls_loss"]
        return value, aux | {"metrics": metrics}

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


def cls_loss(cls, values, config):
    """Mean over rows of the loss between CLS [B M, D] and the mean of the targets [B M, L, D].

    fairseq sums over rows instead, so that its weight 0.01 grows with the batch of a device and M;
    `loss.cls_weight` is the weight of the mean: 0.01 x 16 x 16 = 2.56 as published for ViT-B.
    """
    each = distillation.regression_loss(
        cls, values.mean(1), config.beta, config.reduction, config.scale
    )
    return each.mean()
