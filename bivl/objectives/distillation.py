"""What the self-distilling objectives share: targets from a teacher's layers, and the regression.

Order and constants: data2vec paper (arXiv 2202.03555) section 3.3 and fairseq's
`models/data2vec_audio.py`, `models/data2vec2.py`.
"""

import importlib

import jax
import jax.numpy as jnp

from bivl.core import collapse, ema
from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.objectives import encoding

NORM_AXES = {"layer": (2,), "instance": (1,), "batch": (0, 1), "group": (1, 2)}


def normalize(x, name: str, eps: float = 1e-5, valid=None):
    """Normalises x [B, L, D] without affine, in float32: over D (`layer`), over L per channel
    (`instance`), over B and L per channel (`batch`) or over L and D (`group`).

    With `valid`, bool [B, L], statistics over L are those of the valid tokens."""
    x = x.astype(jnp.float32)
    axes = NORM_AXES[name]
    real = None if valid is None or name == "layer" else valid[..., None]
    mean = x.mean(axes, keepdims=True, where=real)
    variance = jnp.square(x - mean).mean(axes, keepdims=True, where=real)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def average_targets(layers, layer_norms=(), norms=(), valid=None):
    """K arrays [B, L, D] -> targets [B, L, D] in float32.

    Each layer through `layer_norms` in order, arithmetic mean, then the mean through `norms`
    (paper section 3.3; fairseq `models/data2vec_audio.py`). Padding is not excluded, as there,
    unless `valid`, bool [B, L], says what is none.
    """
    total = 0.0
    for x in layers:
        for name in layer_norms:
            x = normalize(x, name, valid=valid)
        total = total + x.astype(jnp.float32)
    y = total / len(layers)
    for name in norms:
        y = normalize(y, name, valid=valid)
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


def check(config) -> None:
    """UserError for teacher, target and loss settings that cannot be."""
    check_teacher(config)
    check_norms("target", config.target)
    choice("target.layer", config.target.layer, ("end", "ffn"))
    choice("loss.reduction", config.loss.reduction, ("mean", "sum"))
    if not isinstance(config.loss.scale, float | int | None):
        raise UserError(f"config.loss.scale={config.loss.scale!r} must be None or a number")


def check_teacher(config) -> None:
    """UserError for a number of layers or a schedule of the average that cannot be."""
    depth, k = config.model.depth, config.top_k_layers
    if not 1 <= k <= depth:
        raise UserError(f"config.top_k_layers={k} must lie between 1 and model.depth={depth}")
    for key in ("ema_decay_start", "ema_decay_end"):
        if not 0 <= config[key] <= 1:
            raise UserError(f"config.{key}={config[key]} must lie in [0, 1]")
    if not all(isinstance(prefix, str) for prefix in config.ema_shared):
        raise UserError(f"config.ema_shared={config.ema_shared} must be paths of parameters")


def check_norms(key: str, target) -> None:
    """UserError for a normalisation that does not exist."""
    for kind in ("layer_norms", "norms"):
        for name in target[kind]:
            choice(f"{key}.{kind}", name, NORM_AXES)


def teacher_targets(encode, config):
    """-> function (params, batch, key) -> (targets [B, L, D] without special tokens, Encoded).

    `encode(params, batch, collect, key)` gives (Tokens, Encoded) of the unmasked input.
    """
    source = {"end": "layers", "ffn": "ffn"}[config.target.layer]

    def teach(params, batch, key=None):
        tokens, encoded = encode(params, batch, ("layers", source), key)
        content = [x[:, tokens.special :] for x in getattr(encoded, source)]
        top = content[-config.top_k_layers :]
        return average_targets(top, config.target.layer_norms, config.target.norms), encoded

    return teach


def stage_metrics(encoded, values) -> dict[str, jax.Array]:
    """`effective_rank/STAGE` and `std/STAGE` of the teacher's embedding, each block's output and
    the targets."""
    stages = {"embedding": encoded.layers[0], "target": values}
    stages |= {f"block_{i}": x for i, x in enumerate(encoded.layers[1:])}
    found = {}
    for name, x in stages.items():
        tokens = collapse.some_tokens(x)
        found[f"effective_rank/{name}"] = collapse.effective_rank(tokens)
        found[f"std/{name}"] = collapse.channel_std(tokens)
    return found


def masked_regression(prediction, target, mask, config):
    """Predictions and targets [B, L, D], mask bool [B, L] -> loss, aux.

    The loss is the mean over masked positions of the whole batch.
    """
    c = config.loss
    each = regression_loss(prediction, target, c.beta, c.reduction, c.scale)
    weight = mask.sum().astype(jnp.float32)
    value = (each * mask).sum() / jnp.maximum(weight, 1)
    metrics = {
        "regression_loss": value,
        "target_std": collapse.channel_std(target, mask),
        "prediction_std": collapse.channel_std(prediction, mask),
        "masked_fraction": mask.mean(),
    }
    if c.std_weight:  # VICReg-style hinge; its weight is 0 in every published recipe
        shortfall = jax.nn.relu(c.std_margin - metrics["prediction_std"])
        value = value + c.std_weight * shortfall
    return value, {"weight": weight, "metrics": metrics}


def teacher_update(config):
    """-> an objective's `update`: the EMA on its schedule."""
    rate = ema.update_rate(config.ema_decay_start, config.ema_decay_end, config.ema_anneal_steps)

    def update(teacher, extras, params, aux, step):
        teacher = ema.track(teacher, params, rate(step))
        distances = collapse.distances(teacher, params)
        metrics = {f"teacher_distance/{stage}": x for stage, x in distances.items()}
        return teacher, extras, {"ema_decay": 1 - rate(step), **metrics}

    return update


def objective(config, build, loss, masked, untracked=()) -> Objective:
    """The objective of a model that regresses its own teacher's targets.

    The teacher holds what is averaged. What `untracked` and `config.ema_shared` name it takes from
    the student as it is: fairseq copies these parts before every forward, which is the same.

    build(modality, dtype): the linen module, with a method `encode(batch, masked, deterministic,
      collect, embed_dropout) -> (Tokens, Encoded)`; calling it initialises everything.
    loss(model, params, batch, values, key): -> loss, aux, from the targets [B, L, D].
    masked(model, params, batch): -> features [B, L, E] at every place of the masked input.
    untracked: paths of parameters that the teacher has no use for.
    """
    check(config)
    modality = importlib.import_module(f"bivl.modalities.{config.modality}")
    spec = modality.spec(config)
    prepare, shown = (
        getattr(modality, hook)(config) if hasattr(modality, hook) else lambda batch: batch
        for hook in ("device_ops", "teacher_input")
    )
    student, teacher = (build(modality, dtype) for dtype in (config.dtype, config.teacher_dtype))

    def encoder(model, embed_dropout=False):
        def encode(params, batch, collect, key=None):
            options = {"collect": collect, "embed_dropout": embed_dropout, "method": "encode"}
            rngs = {"dropout": key} if embed_dropout else None
            return model.apply({"params": params}, batch, rngs=rngs, **options)

        return encode

    # Where the code's teacher reads the student's embeddings, it reads them as dropped out there.
    teach = teacher_targets(encoder(teacher, config.target.embed_dropout), config)
    own = teacher_targets(encoder(student), config)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        params = student.init({"params": key, "dropout": key}, batch)["params"]
        tracked = ema.without(params, (*untracked, *config.ema_shared))
        return params, jax.tree.map(jnp.copy, tracked), {}

    def targets(params, teacher, extras, batch, key):
        values, encoded = teach(ema.completed(teacher, params), shown(batch), key)
        return {"values": values, "metrics": stage_metrics(encoded, values)}

    def total(params, extras, batch, targets, key):
        value, aux = loss(student, params, batch, targets["values"], key)
        return value, aux | {"metrics": aux["metrics"] | targets["metrics"]}

    predict = encoding.predictions(encoder(student), modality, config)
    predict["targets"] = lambda params, extras, batch: own(params, batch)[0]
    predict["masked"] = lambda params, extras, batch: masked(student, params, prepare(batch))
    ops = modality.train_ops(config), modality.eval_ops(config), modality.preprocess(config)
    examples = modality.examples(config) if hasattr(modality, "examples") else lambda source: source
    update = teacher_update(config)
    return Objective(spec, init, targets, total, update, predict, *ops, examples, prepare)
