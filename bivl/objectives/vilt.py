"""ViLT: words named beside their image, pairs told from other pairings, and words laid on patches.

arXiv 2102.03334, sections 3.1 and 3.2; dandelin/ViLT `vilt/modules/objectives.py`. Two forward
passes a step: the masked text with its own image (`mlm`), and the whole text with its own image or,
for half of the batch, another's (`itm`). There the optimal transport of words to patches is made
cheap for pairs and dear for others (`wpa`). The other images are those of the same batch, drawn for
each step, where ViLT draws from the whole data set.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import single_stream as modality
from bivl.models.single_stream import SingleStream
from bivl.models.transformer import EncoderConfig
from bivl.objectives.classify import no_targets, no_update
from bivl.objectives.mim import masked_places, named

LOSSES = ("mlm", "itm", "wpa")
BETA, STEPS = 0.5, 50  # of the transport


def transport(cost, texts, patches):
    """The plan of least cost by proximal steps (IPOT, arXiv 1802.04307): [B, n, m], n patches down.

    cost: [B, m, n]; texts bool [B, m] and patches bool [B, n], True = real; what is not real gets
    nothing. Each real row and column has the mass 1 / n, 1 / m.
    """
    m, n = (real.sum(1, keepdims=True).astype(cost.dtype) for real in (texts, patches))
    both = patches[:, :, None] & texts[:, None, :]
    kernel = jnp.where(both, jnp.exp(-cost.swapaxes(1, 2) / BETA), 0)

    def inverse(x, real):
        return jnp.where(real, 1 / jnp.maximum(x, 1e-30), 0)

    def step(_, state):
        plan, across = state
        weighted = kernel * plan
        down = inverse(n * jnp.einsum("Bnm,Bm->Bn", weighted, across), patches)
        across = inverse(m * jnp.einsum("Bnm,Bn->Bm", weighted, down), texts)
        return down[:, :, None] * weighted * across[:, None, :], across

    first = both.astype(cost.dtype), inverse(m, texts)
    return jax.lax.fori_loop(0, STEPS, step, first)[0]


def distances(x, y, texts, patches):
    """Cost of the transport of x [B, m, D] to y [B, n, D] by 1 - cosine: float32 [B]. The plan has
    no gradient."""
    x, y = (z.astype(jnp.float32) for z in (x, y))
    x, y = (z * jax.lax.rsqrt(jnp.square(z).sum(-1, keepdims=True) + 1e-12) for z in (x, y))
    cost = 1 - jnp.einsum("BmD,BnD->Bmn", x, y)
    cost = jnp.where(texts[:, :, None] & patches[:, None, :], cost, 0)
    plan = transport(jax.lax.stop_gradient(cost), texts, patches)
    return jnp.einsum("Bmn,Bnm->B", cost, plan)


def inner(padding):
    """bool [B, L], True = pad -> the tokens between the first and the last that is no pad."""
    last = (~padding).sum(1, keepdims=True) - 1
    places = jnp.arange(padding.shape[1])
    return (places > 0) & (places < last)


def shuffled(images, key):
    """Images [B, ...] of which half are another's of the batch -> (images, matched bool [B])."""
    B = len(images)
    key_half, key_other = jax.random.split(key)
    matched = jax.random.permutation(key_half, B) < B - B // 2
    other = (jnp.arange(B) + jax.random.randint(key_other, (), 1, max(B, 2))) % B
    return images[jnp.where(matched, jnp.arange(B), other)], matched


def weights(config) -> dict[str, float]:
    """The losses that there are, and what they weigh."""
    for name in config.loss_weights:
        choice("loss_weights", name, LOSSES)
    found = {name: config.loss_weights.get(name, 0.0) for name in LOSSES}
    return {name: weight for name, weight in found.items() if weight}


def make_model(config, losses) -> SingleStream:
    """The model of a config, with the heads that the losses need."""
    embed = modality.make_embed(config, config.dtype)
    words, m = embed.vocabulary if "mlm" in losses else 0, config.model
    encoder = EncoderConfig.of(m, config.dtype)
    return SingleStream(embed, encoder, m.pooler, words, m.tied, "itm" in losses)


def make(config) -> Objective:
    """Reads `data` (pairs), `image_size model pair augment loss_weights dtype`.

    loss_weights: of mlm, itm and wpa; where one is 0 its head is not there. predict: `encode`,
    `features` (pooled, float32), `attention` of the first token to the patches, [B, H, h, w], and
    with their losses `logits` of every word [B, L, V] and `matching` [B, 2].
    """
    choice("modality", config.modality, ("single_stream",))
    losses, spec = weights(config), modality.spec(config)
    model, pad = make_model(config, losses), modality.make_embed(config, config.dtype).pad
    most = modality.most_masked(config)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        return model.init(key, batch)["params"], {}, {}

    def apply(params, batch, key=None, **options) -> Any:
        random = {} if key is None else {"deterministic": False, "rngs": {"dropout": key}}
        return model.apply({"params": params}, batch, method="encode", **options, **random)

    def totals(batch):
        masked = jnp.maximum(batch["text_mask"].sum(), 1)
        return {"mlm": masked.astype(jnp.float32)}

    def words(params, batch, key):
        _, out, _ = apply(params, batch, key, masked=True)
        places, valid = masked_places(batch["text_mask"], most)
        x = jnp.take_along_axis(out.tokens, places[..., None], axis=1)
        logits = model.apply({"params": params}, x, method="name_words")
        classes = jnp.take_along_axis(batch["tokens"], places, axis=1)
        total = (batch.get("totals") or totals(batch))["mlm"]
        share = jnp.maximum(valid.sum(), 1) / total  # of the mean that these rows are
        loss, right = (x * share for x in named(logits, classes, valid.astype(jnp.float32)))
        return {"mlm": loss}, {"mlm_loss": loss, "mlm_accuracy": right}

    def pairs(params, batch, key):
        keys, L = jax.random.split(key), batch["tokens"].shape[1]
        image, matched = shuffled(batch["image"], keys[0])
        _, out, pooled = apply(params, batch | {"image": image}, keys[1])
        found, metrics = {}, {}
        if "itm" in losses:
            logits: Any = model.apply({"params": params}, pooled, method="match")
            each = jnp.ones((len(matched), 1))
            loss, right = named(logits[:, None], matched[:, None].astype(jnp.int32), each)
            found["itm"], metrics = loss, {"itm_loss": loss, "itm_accuracy": right}
        if "wpa" in losses:
            texts, patches = out.tokens[:, :L], out.tokens[:, L + 1 :]
            real = jnp.ones(patches.shape[:2], bool)
            cost = distances(texts, patches, inner(batch["tokens"] == pad), real)
            found["wpa"] = jnp.where(matched, cost, -cost).mean()
            metrics["wpa_loss"] = found["wpa"]
        return found, metrics

    def loss(params, extras, batch, targets, key):
        del extras, targets
        keys = jax.random.split(key)
        values, metrics = words(params, batch, keys[0]) if "mlm" in losses else ({}, {})
        if "itm" in losses or "wpa" in losses:
            more, seen = pairs(params, batch, keys[1])
            values, metrics = values | more, metrics | seen
        value = sum(losses[name] * values[name] for name in values)
        return value, {"weight": jnp.float32(1), "metrics": metrics}

    def examples(source):
        if not losses:
            raise UserError(
                f"config.loss_weights of {', '.join(LOSSES)} are all 0; raise one of them"
            )
        return source

    ops = modality.train_ops(config), modality.eval_ops(config), modality.preprocess(config)
    predict = predictions(model, config)
    return Objective(
        spec, init, no_targets, loss, no_update, predict, *ops, examples=examples, totals=totals
    )


def predictions(model: SingleStream, config) -> dict:
    """See `make`."""

    def read(params, batch, collect=()) -> Any:
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def encode(params, extras, batch):
        tokens, out, pooled = read(params, batch, ("layers",))
        found = {"tokens": out.tokens, "pooled": pooled, "layers": out.layers}
        return found | {"padding": tokens.padding}

    def features(params, extras, batch):
        return read(params, batch)[2].astype(jnp.float32)

    def attention(params, extras, batch):
        grid = modality.grid(config)
        first = read(params, batch, ("weights",))[1].weights[-1][:, :, 0, -grid[0] * grid[1] :]
        return first.reshape(*first.shape[:2], *grid)

    def logits(params, extras, batch):
        x = read(params, batch)[1].tokens[:, : batch["tokens"].shape[1]]
        return model.apply({"params": params}, x, method="name_words")

    def matching(params, extras, batch):
        return model.apply({"params": params}, read(params, batch)[2], method="match")

    found = {"features": features, "encode": encode, "attention": attention}
    found |= {"logits": logits} if model.words else {}
    return found | ({"matching": matching} if model.matching else {})
