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
from bivl.modalities import image, image_text
from bivl.models.image_text import HeadsConfig
from bivl.models.multiway import MultiwayConfig
from bivl.objectives import streams

POOLS = ("first", "mean")


def info_nce(images, texts, log_scale):
    """Unit vectors [B, E] of images and their texts -> (loss, metrics), all in float32.

    The mean of two cross-entropies: of the right text among all for each image, and the reverse.
    The accuracies are those of the nearest within the batch.
    """
    logits = jnp.exp(log_scale) * images @ texts.T
    right = jnp.arange(len(logits))
    loss, metrics = 0.0, {"temperature": jnp.exp(-log_scale)}
    for name, rows in (("image_to_text", logits), ("text_to_image", logits.T)):
        loss = loss - 0.5 * jnp.diagonal(jax.nn.log_softmax(rows)).mean()
        metrics[f"contrast_accuracy/{name}"] = (rows.argmax(-1) == right).mean()
    return loss, metrics


def check(config) -> None:
    """UserError for what contrast cannot be computed with."""
    choice("contrast.pool", config.contrast.pool, POOLS)
    if config.contrast.width < 1:
        raise UserError(f"config.contrast.width={config.contrast.width} must be at least 1")
    if config.optimizer.accumulate > 1:
        raise UserError(
            f"config.optimizer.accumulate={config.optimizer.accumulate}: contrast compares the "
            "whole batch, which micro-batches would cut; set it to 1, or use remat to save memory"
        )


def make(config) -> Objective:
    """Reads `data` (pairs), `image_size model pair augment contrast.{width, pool, masked} dtype`.

    contrast.masked: images and texts are contrasted masked as in pre-training, so that few pairs
    are not learnt by heart (FLIP masks images to go faster, arXiv 2212.00794).
    """
    choice("modality", config.modality, ("image_text",))
    check(config)
    grid, encoder = image_text.grid(config), MultiwayConfig.of(config.model, config.dtype)
    embed = image_text.make_embed(config, config.dtype)
    heading, pool = HeadsConfig(contrast=config.contrast.width), config.contrast.pool
    model = streams.ImageText(embed, encoder, heading, grid)
    B, masked = config.batch_size, config.contrast.masked
    if masked and not image.keeps_all(config):
        raise UserError("config.contrast.masked needs masking.kind='block'; use that or False")
    spec = image_text.spec(config, {"pairs": B})["pairs"]
    if not masked:
        spec = {name: spec[name] for name in ("image", "tokens")}
    train_ops = (image_text.masked_pair_ops if masked else image_text.pair_ops)(config)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        return model.init(key, batch)["params"], {}, {}

    def loss(params, extras, batch, targets, key):
        del extras, targets
        vectors = {}
        keys = jax.random.split(key)
        for names, key in zip((("image", "mask"), ("tokens", "inputs")), keys, strict=True):
            only = {name: batch[name] for name in names if name in batch}
            options = {"rngs": {"dropout": key}, "method": "embeddings"}
            vectors[names[0]] = model.apply(
                {"params": params}, only, pool, masked, False, **options
            )
        scale = params["heads"]["logit_scale"]["value"]
        value, metrics = info_nce(vectors["image"], vectors["tokens"], scale)
        return value, {"weight": jnp.float32(B), "metrics": metrics}

    def update(teacher, extras, params, aux, step):
        return teacher, extras, {}

    predict = streams.predictions(model, config, pool)

    def logits(params, extras, batch):
        """Scaled similarities [images, texts]."""
        scale = jnp.exp(params["heads"]["logit_scale"]["value"])
        vectors = (
            predict[f"{name}_embeddings"](params, extras, batch) for name in ("image", "text")
        )
        images, texts = vectors
        return scale * images @ texts.T

    ops = train_ops, image_text.eval_ops(config), image_text.preprocess(config)
    no_targets = lambda *_: {}  # noqa: E731
    return Objective(spec, init, no_targets, loss, update, predict | {"logits": logits}, *ops)
