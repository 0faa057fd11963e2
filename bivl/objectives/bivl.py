"""bivl: a multiway encoder taught by its own moving average on images, texts and pairs at once.

What is new beside its two sources. BEiT-3 (arXiv 2208.10442) predicts the ids of masked patches and
words, patches' by a tokenizer that another model must have taught first. data2vec (arXiv
2202.03555, 2212.07525) needs no tokenizer, but learns one modality a model. Here the multiway
encoder of BEiT-3 regresses, at masked places of images, texts and pairs, what an average of itself
makes of the whole input:

  teacher   sees images, texts and pairs unmasked; targets are the mean of its top K layers,
            normalised for each modality by itself (target.image, target.text).
  pairs     are seen jointly (target.pairs='joint'): the target of a patch then holds what the words
            say about it, so a masked patch must be sought in the text as well; or `apart`, with the
            targets that the image and the text would have alone.
  masks     as BEiT-3's. With masking.kind='block' masked patches have a token; with inverse_block
            or random the student sees the kept ones only, in M clones that share their targets, and
            a small decoder fills in the rest (data2vec 2.0).
  beside    token_weights: BEiT-3's cross-entropies at the same places, of words with no tokenizer
            but the text's own, of patches with a visual tokenizer (`teacher`, as in mdm).
            contrast.weight: InfoNCE of the pairs' images and texts, each alone, of those modalities
            masked that contrast.masked names: what joins the two spaces where no stream does.

docs/bivl.md holds what has been measured of these choices at tiny size; nothing larger is trained.
"""

import jax
import jax.numpy as jnp

from bivl.core import collapse, ema
from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import image_text
from bivl.models.image_text import HeadsConfig
from bivl.objectives import contrastive, distillation, streams

SOURCES = {"end": "layers", "ffn": "ffn"}


def make(config) -> Objective:
    """Reads what streams.py reads, and `top_k_layers target loss loss_weights token_weights
    contrast ema_* teacher teacher_dtype decoder`."""
    setup = streams.open_streams(config)
    _check(config, setup)
    contrast = config.contrast.weight
    tokens = tuple(name for name in setup.losses if config.token_weights[name])
    tokenizer = streams.open_tokenizer(config, tokens)
    heading = HeadsConfig(
        **streams.heads_sizes(config, tokenizer, tokens),
        regression=tuple({streams.LOSSES[name][1]: 0 for name in setup.losses}),
        decoder=streams.decoding(config),
        **(contrastive.heading(config) if contrast else {}),
    )
    student = setup.model(heading, config.dtype)
    teacher_model = setup.model(heading, config.teacher_dtype)

    def init(key):
        params = setup.init(student, key)
        tracked = ema.without(params, ("heads", *config.ema_shared))
        held = tokenizer.state(jax.random.fold_in(key, 1)) if tokenizer else {}
        return params, jax.tree.map(jnp.copy, tracked) | held, {}

    def targets(params, teacher, extras, batch, key):
        whole = ema.completed(_average(teacher), params)
        values, metrics = _targets(teacher_model, whole, setup, batch)
        codes = streams.image_codes(tokenizer, teacher, batch, tokens)
        return {"values": values, "codes": codes, "metrics": metrics}

    def loss(params, extras, batch, targets, key):
        keys = jax.random.split(key)
        totals = batch.get("totals") or setup.totals(batch)
        places = setup.masked(student, params, batch, keys[0])
        losses, metrics = regression_losses(
            student, params, places, targets["values"], totals, config
        )
        value = sum(config.loss_weights[name] * losses[name] for name in losses)
        wanted = streams.classes_at(places, targets["codes"], batch, tokens)
        terms, found = streams.token_losses(student, params, places, wanted, totals)
        value += sum(config.token_weights[name] * terms[name] for name in terms)
        metrics |= found
        if contrast:
            images, texts = contrastive.vectors(student, params, batch["pairs"], config, keys[1])
            scale = params["heads"]["logit_scale"]["value"]
            term, found = contrastive.info_nce(images, texts, scale)
            value += contrast * term
            metrics |= found | {"contrast_loss": term}
        return value, {"weight": jnp.float32(1), "metrics": metrics | targets["metrics"]}

    rate = ema.update_rate(config.ema_decay_start, config.ema_decay_end, config.ema_anneal_steps)

    def update(teacher, extras, params, aux, step):
        average = ema.track(_average(teacher), params, rate(step))
        metrics = collapse.distances(average, params)
        metrics = {f"teacher_distance/{stage}": x for stage, x in metrics.items()}
        return teacher | average, extras, {"ema_decay": 1 - rate(step), **metrics}

    predict = streams.predictions(student, config, config.contrast.pool)
    if "images" in setup.sizes or "pairs" in setup.sizes:

        def image_targets(params, extras, batch):
            return teach(student, params, {"image": batch["image"]}, config)["image"]

        predict["targets"] = image_targets
    ops = image_text.train_ops(config), image_text.eval_ops(config), image_text.preprocess(config)
    return Objective(
        setup.spec, init, targets, loss, update, predict, *ops, image_text.examples(config),
        totals=setup.totals, frozen=tokenizer.checkpoints if tokenizer else {},
    )  # fmt: skip


def _average(teacher) -> dict:
    """What of `teacher` is the student's average; beside it may stand a frozen tokenizer."""
    return {name: tree for name, tree in teacher.items() if name != "teacher"}


def _check(config, setup) -> None:
    """UserError for teacher, targets and weights that cannot be."""
    for modality in ("image", "text"):
        distillation.check_norms(f"target.{modality}", config.target[modality])
    weights = [
        kind[name] for kind in (config.loss_weights, config.token_weights) for name in setup.losses
    ]
    if not any((*weights, config.contrast.weight)):
        raise UserError("config.loss_weights, token_weights and contrast.weight are all 0; set one")
    distillation.check_teacher(config)
    choice("target.layer", config.target.layer, SOURCES)
    choice("target.pairs", config.target.pairs, ("joint", "apart"))
    choice("loss.reduction", config.loss.reduction, ("mean", "sum"))
    if not config.contrast.weight:
        choice("contrast.pool", config.contrast.pool, ("first", "mean"))
        return
    contrastive.check(config)
    if "pairs" not in setup.sizes:
        raise UserError("config.contrast.weight needs data.pairs.weight; set the first to 0")


def teach(model, params, batch, config) -> dict[str, jax.Array]:
    """{modality: targets [B, N or L, D]} of an unmasked image, text or pair, each modality's top K
    layers normalised over its own tokens, pads left out."""
    source = SOURCES[config.target.layer]
    tokens, encoded = model.apply(
        {"params": params}, batch, collect=("layers", source), method="encode"
    )
    top = getattr(encoded, source)[-config.top_k_layers :]
    cuts = {"image": slice(1, tokens.images), "text": slice(tokens.images, None)}
    found = {}
    for modality, given in (("image", "image"), ("text", "tokens")):
        if given in batch:
            cut, norms = cuts[modality], config.target[modality]
            valid = None if tokens.padding is None else ~tokens.padding[:, cut]
            found[modality] = distillation.average_targets(
                [x[:, cut] for x in top],
                norms.layer_norms,
                norms.norms,
                valid if modality == "text" else None,
            )
    return found


def _targets(model, params, setup, batch):
    """-> {loss: targets at all places}, metrics of the streams' stages."""
    config, values, metrics = setup.config, {}, {}
    for part in setup.sizes:
        inputs = {name: batch[part][name] for name in ("image", "tokens") if name in batch[part]}
        apart = part == "pairs" and config.target.pairs == "apart"
        calls = [{name: x} for name, x in inputs.items()] if apart else [inputs]
        found = {}
        for call in calls:
            found |= teach(model, params, call, config)
        for name in setup.losses:
            if streams.LOSSES[name][0] == part:
                values[name] = found[streams.LOSSES[name][1]]
                some = collapse.some_tokens(values[name])
                metrics[f"effective_rank/{name}"] = collapse.effective_rank(some)
    return values, metrics


def regression_losses(model, params, places, values, totals, config):
    """Regression at masked places: -> {loss: mean}, metrics.

    places: {loss: Masked}; values: {loss: targets [B, N or L, D]}. `target_std` and
    `prediction_std`, which the guards watch, are the smallest of the streams'.
    """
    losses, metrics, c = {}, {}, config.loss
    for name, p in places.items():
        modality = streams.LOSSES[name][1]
        options = {"method": lambda m, x, modality=modality: m.heads.regress(x, modality)}
        prediction = model.apply({"params": params}, p.x, **options)
        target = streams.at(values[name], p)
        each = distillation.regression_loss(prediction, target, c.beta, c.reduction, c.scale)
        losses[name] = (each * p.valid).sum() / totals[name]
        metrics[f"regression_loss/{name}"] = losses[name]
        metrics[f"target_std/{name}"] = collapse.channel_std(target, p.valid)
        metrics[f"prediction_std/{name}"] = collapse.channel_std(prediction, p.valid)
    for kind in ("target_std", "prediction_std"):
        each = [metrics[f"{kind}/{name}"] for name in places]
        metrics[kind] = jnp.stack(each).min()
    return losses, metrics
