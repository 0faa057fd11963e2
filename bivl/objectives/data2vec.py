"""data2vec 1.0: an EMA teacher sees the whole input, the student regresses its top-K layers.

One file for all modalities; the config names the modality. Authority for vision is
facebookresearch/data2vec_vision (the code behind the published numbers), for text and speech
fairseq's examples/data2vec; paper: arXiv 2202.03555.
"""

import importlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core import collapse, ema
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.models.layers import Projection
from bivl.models.transformer import Encoder, EncoderConfig

NORM_AXES = {"layer": (2,), "instance": (1,), "batch": (0, 1), "group": (1, 2)}


def normalize(x, name: str, eps: float = 1e-5):
    """Normalises x [B, L, D] without affine, in float32: over D (`layer`), over L per channel
    (`instance`), over B and L per channel (`batch`) or over L and D (`group`)."""
    x = x.astype(jnp.float32)
    axes = NORM_AXES[name]
    mean = x.mean(axes, keepdims=True)
    variance = jnp.square(x - mean).mean(axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def average_targets(layers, layer_norms=(), norms=()):
    """K arrays [B, L, D] -> targets [B, L, D] in float32.

    Each layer through `layer_norms` in order, arithmetic mean, then the mean through `norms`
    (paper section 3.3; fairseq `models/data2vec_audio.py`). Padding is not excluded, as there.
    """
    total = 0.0
    for x in layers:
        for name in layer_norms:
            x = normalize(x, name)
        total = total + x.astype(jnp.float32)
    y = total / len(layers)
    for name in norms:
        y = normalize(y, name)
    return y


def regression_loss(prediction, target, beta: float, reduction: str, scale: float | None = None):
    """Smooth L1 (beta > 0) or squared error (beta 0) of [..., D] -> [...], in float32.

    reduction `mean` averages over D (data2vec_vision); `sum` sums over D and multiplies by `scale`,
    by default 1 / sqrt(D) (fairseq).
    """
    d = jnp.abs(prediction.astype(jnp.float32) - target.astype(jnp.float32))
    loss = jnp.where(d < beta, 0.5 * d * d / beta, d - 0.5 * beta) if beta else d * d
    if reduction == "mean":
        return loss.mean(-1)
    return loss.sum(-1) * (d.shape[-1] ** -0.5 if scale is None else scale)


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


def _check(config):
    depth, k = config.model.depth, config.top_k_layers
    if not 1 <= k <= depth:
        raise UserError(f"config.top_k_layers={k} must lie between 1 and model.depth={depth}")
    if config.model.width % config.model.num_heads:
        raise UserError(
            f"config.model.width={config.model.width} is not a multiple of "
            f"model.num_heads={config.model.num_heads}"
        )
    for key in ("ema_decay_start", "ema_decay_end"):
        if not 0 <= config[key] <= 1:
            raise UserError(f"config.{key}={config[key]} must lie in [0, 1]")


def make(config) -> Objective:
    """Reads `modality model top_k_layers target loss ema_* dtype teacher_dtype`."""
    _check(config)
    modality = importlib.import_module(f"bivl.modalities.{config.modality}")

    def build(dtype):
        return Data2Vec(modality.make_embed(config, dtype), EncoderConfig.of(config.model, dtype))

    student, tutor = build(config.dtype), build(config.teacher_dtype)
    spec = modality.spec(config)
    rate = ema.update_rate(config.ema_decay_start, config.ema_decay_end, config.ema_anneal_steps)
    source = "layers" if config.target.layer == "end" else "ffn"

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        params = student.init(key, batch)["params"]
        return params, jax.tree.map(jnp.copy, params), {}

    def teach(model, params, batch):
        tokens, encoded = model.apply(
            {"params": params}, batch, collect=("layers", source), method="encode"
        )
        content = [x[:, tokens.special :] for x in getattr(encoded, source)]
        values = average_targets(
            content[-config.top_k_layers :], config.target.layer_norms, config.target.norms
        )
        return values, encoded

    def targets(teacher, extras, batch, key):
        values, encoded = teach(tutor, teacher, batch)
        stages = ["embedding", *(f"block_{i}" for i in range(config.model.depth))]
        ranks = dict(zip(stages, encoded.layers, strict=True)) | {"target": values}
        metrics = {f"effective_rank/{k}": collapse.effective_rank(x) for k, x in ranks.items()}
        return {"values": values, "metrics": metrics}

    def loss(params, extras, batch, targets, key):
        prediction = student.apply(
            {"params": params}, batch, deterministic=False, rngs={"dropout": key}
        )
        c, mask = config.loss, batch["mask"]
        each = regression_loss(prediction, targets["values"], c.beta, c.reduction, c.scale)
        weight = mask.sum().astype(jnp.float32)
        value = (each * mask).sum() / weight
        prediction_std = collapse.channel_std(prediction, mask)
        metrics = {
            "regression_loss": value,
            "target_std": collapse.channel_std(targets["values"], mask),
            "prediction_std": prediction_std,
            "masked_fraction": mask.mean(),
        }
        if c.std_weight:  # VICReg-style hinge; its weight is 0 in every published recipe
            value = value + c.std_weight * jax.nn.relu(c.std_margin - prediction_std)
        return value, {"weight": weight, "metrics": metrics | targets["metrics"]}

    def update(teacher, extras, params, aux, step):
        copied = lambda path: "/".join(path).startswith(tuple(config.ema_copied))  # noqa: E731
        teacher = ema.track(teacher, params, rate(step), copied)
        return teacher, extras, {"ema_decay": 1 - rate(step)}

    def encode(params, extras, batch):
        tokens, out = student.apply({"params": params}, batch, collect=("layers",), method="encode")
        pooled = modality.pool(out.tokens, tokens)
        result = {"tokens": out.tokens, "pooled": pooled, "layers": out.layers}
        return result if tokens.padding is None else result | {"padding": tokens.padding}

    def features(params, extras, batch):
        tokens, out = student.apply({"params": params}, batch, method="encode")
        content = out.tokens[:, tokens.special :].astype(jnp.float32)
        if tokens.padding is None:
            return content.mean(1)
        real = ~tokens.padding[:, tokens.special :, None]
        return (content * real).sum(1) / jnp.maximum(real.sum(1), 1)

    def attention(params, extras, batch):
        tokens, out = student.apply(
            {"params": params}, batch, collect=("weights",), method="encode"
        )
        cls_row = out.weights[-1][:, :, 0, tokens.special :]
        return cls_row.reshape(*cls_row.shape[:2], *modality.grid(config))

    predict = {
        "features": features,
        "encode": encode,
        "targets": lambda params, extras, batch: teach(student, params, batch)[0],
        "attention": attention,
    }
    train_ops, eval_ops = modality.train_ops(config), modality.eval_ops(config)
    preprocess = modality.preprocess(config)
    return Objective(spec, init, targets, loss, update, predict, train_ops, eval_ops, preprocess)
