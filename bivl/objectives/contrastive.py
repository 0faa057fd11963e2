"""Contrast of images and texts: symmetric InfoNCE over the global batch with a learned temperature.

BEiT-3's intermediate tuning ("itc", beit3/modeling_finetune.py and utils.py): the image alone and
the text alone through the encoder, CLS and `<s>` through linear maps, unit length, and a scale that
starts at 1 / 0.07 and is not clamped. CLIP, arXiv 2103.00020, figure 3.
"""

import jax
import jax.numpy as jnp

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import image, image_text, towers
from bivl.models.image_text import HeadsConfig
from bivl.models.multiway import MODALITIES, MultiwayConfig
from bivl.objectives import streams
from bivl.objectives import towers as two_towers

POOLS = ("first", "mean", "patches")
FIELDS = {"image": ("image", "mask", "keep"), "text": ("tokens", "inputs", "text_mask")}


def info_nce(images, texts, log_scale, smoothing: float = 0.0):
    """Unit vectors [B, E] of images and their texts -> (loss, metrics), all in float32.

    The mean of two cross-entropies: of the right text among all for each image, and the reverse.
    `smoothing`: the share of a label that all have alike, the right one too. The accuracies are
    those of the nearest within the batch.
    """
    logits = jnp.exp(log_scale) * images @ texts.T
    right = jnp.arange(len(logits))
    loss, metrics = 0.0, {"temperature": jnp.exp(-log_scale)}
    for name, rows in (("image_to_text", logits), ("text_to_image", logits.T)):
        logs = jax.nn.log_softmax(rows)
        alike = smoothing * logs.mean() if smoothing else 0.0
        loss = loss - 0.5 * ((1 - smoothing) * jnp.diagonal(logs).mean() + alike)
        metrics[f"contrast_accuracy/{name}"] = (rows.argmax(-1) == right).mean()
    return loss, metrics


def vectors(model, params, pairs, config, key):
    """Unit vectors [B, E] of the images alone and of the texts alone, of those modalities masked
    that `contrast.masked` names; of the clones of an image the first is seen."""
    found = []
    for (modality, names), each in zip(FIELDS.items(), jax.random.split(key), strict=True):
        only = {name: pairs[name] for name in names if name in pairs}
        masked = modality in config.contrast.masked
        if "keep" in only:
            only |= {name: only[name][:, :1] for name in ("mask", "keep")}
        options = {"rngs": {"dropout": each}, "method": "embeddings"}
        call = (only, config.contrast.pool, masked, False)
        found.append(model.apply({"params": params}, *call, **options))
    return found


def check(config) -> None:
    """UserError for what contrast cannot be computed with."""
    choice("contrast.pool", config.contrast.pool, POOLS)
    for modality in config.contrast.masked:
        choice("contrast.masked", modality, tuple(FIELDS))
    if config.contrast.width < 1:
        raise UserError(f"config.contrast.width={config.contrast.width} must be at least 1")
    left_out = "image" in config.contrast.masked and not image.keeps_all(config)
    if config.contrast.pool == "patches" and left_out:
        raise UserError(
            "config.contrast.pool='patches' reads all patches; take image out of contrast.masked "
            "or set masking.kind to 'block'"
        )
    _whole(config)


def heading(config) -> dict:
    """The sizes of the heads of contrast, as HeadsConfig takes them.

    contrast.text, `encoder` where a config lacks it: a text's vector is what the encoder makes of
    it, projected; or of `words`, the sum of vectors that they have in the common space, in any
    order. With few pairs the sum generalises where the encoder learns by heart (docs/bivl.md).
    """
    c, bag = config.contrast, 0
    if choice("contrast.text", c.get("text", "encoder"), ("encoder", "words")) == "words":
        bag = image_text.make_embed(config, config.dtype).vocabulary
    return {"contrast": c.width, "patches": c.pool == "patches", "bag": bag}


def _whole(config) -> None:
    if config.optimizer.accumulate > 1:
        raise UserError(
            f"config.optimizer.accumulate={config.optimizer.accumulate}: contrast compares the "
            "whole batch, which micro-batches would cut; set it to 1, or use remat to save memory"
        )


def make(config) -> Objective:
    """Contrast of a multiway encoder, or of two towers where modality is `towers` (see `_towers`).

    Reads `data` (pairs), `image_size model pair augment contrast.{width, pool, masked, text}
    dtype`.

    contrast.pool: what is projected, the first token, the mean of the others, or an image's
    `patches` side by side, each place with weights of its own, and the mean of a text.
    contrast.masked: the modalities that are contrasted masked as in pre-training (pair.mask_ratio,
    mask_ratio), so that few pairs are not learnt by heart (FLIP masks images to go faster, arXiv
    2212.00794).
    """
    if choice("modality", config.modality, ("image_text", "towers")) == "towers":
        return _towers(config)
    check(config)
    grid, encoder = image_text.grid(config), MultiwayConfig.of(config.model, config.dtype)
    embed = image_text.make_embed(config, config.dtype)
    model = streams.ImageText(embed, encoder, HeadsConfig(**heading(config)), grid)
    B, masked = config.batch_size, config.contrast.masked
    spec = image_text.spec(config, {"pairs": B})["pairs"]
    if not masked:
        spec = {name: spec[name] for name in ("image", "tokens")}
    train_ops = (image_text.masked_pair_ops if masked else image_text.pair_ops)(config)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        return model.init(key, batch)["params"], {}, {}

    def loss(params, extras, batch, targets, key):
        del extras, targets
        images, texts = vectors(model, params, batch, config, key)
        value, metrics = info_nce(images, texts, params["heads"]["logit_scale"]["value"])
        return value, {"weight": jnp.float32(B), "metrics": metrics}

    def update(teacher, extras, params, aux, step):
        return teacher, extras, {}

    predict = streams.predictions(model, config, config.contrast.pool)

    def logits(params, extras, batch):
        """Scaled similarities [images, texts]."""
        scale = jnp.exp(params["heads"]["logit_scale"]["value"])
        images, texts = (
            predict[f"{name}_embeddings"](params, extras, batch) for name in ("image", "text")
        )
        return scale * images @ texts.T

    ops = train_ops, image_text.eval_ops(config), image_text.preprocess(config)
    no_targets = lambda *_: {}  # noqa: E731
    return Objective(spec, init, no_targets, loss, update, predict | {"logits": logits}, *ops)


def _towers(config) -> Objective:
    """CLIP and ALIGN. Reads `data` (pairs), `image_size model pair augment contrast`.

    contrast.width: of the common space; contrast.max_scale: the most that similarities are
    multiplied by in training, 0: no limit; contrast.smoothing: of labels, ALIGN's.

    Batch norms see the whole batch, of all devices together; their running statistics are extras. A
    model with one tower, or without projections, can be read but not trained.
    """
    _whole(config)
    if config.optimizer.layer_decay != 1:
        raise UserError("config.optimizer.layer_decay is for models with one encoder; set it to 1")
    model, spec = two_towers.make_model(config, config.contrast.width), towers.spec(config)
    top = config.contrast.max_scale

    def loss(params, extras, batch, targets, key):
        del targets
        vectors, variables = [], {"params": params, **extras}
        for name, each in zip(MODALITIES, jax.random.split(key), strict=True):
            only = {field: batch[field] for field in two_towers.FIELDS[name] if field in batch}
            options = {"rngs": {"dropout": each}, "method": "embeddings", "mutable": list(extras)}
            vector, seen = model.apply(variables, only, name, False, **options)
            vectors.append(vector)
            variables |= seen
        scale = model.apply({"params": params}, top, method="log_scale")
        smoothing = config.contrast.get("smoothing", 0.0)
        value, metrics = info_nce(vectors[0], vectors[1], scale, smoothing)
        aux = {"weight": jnp.float32(config.batch_size), "metrics": metrics}
        return value, aux | {"sums": {name: variables[name] for name in extras}}

    def examples(source):
        if len(model.present) < 2 or not model.width:
            raise UserError(
                f"config.model.towers={model.present}, contrast.width={model.width}: contrast "
                "needs image and text and a positive width; start from a model that has both"
            )
        return source

    def init(key):
        params, extras = two_towers.init(model, spec, key)
        return params, {}, extras

    return Objective(
        spec,
        init,
        lambda *_: {},
        loss,
        lambda teacher, extras, params, aux, step: (teacher, aux["sums"], {}),
        two_towers.predictions(model, config),
        towers.train_ops(config),
        towers.eval_ops(config),
        towers.preprocess(config),
        examples,
    )
